"""The number that a fraction means, exactly and in bounded memory, for any count of rows.

DataComp's definition (RECIPES 11, apply_filter.py): with the N eligible scores in descending order the threshold is
`sorted[min(int(N * fraction), N - 1)]`, and every row with score >= threshold is kept; rows that tie with it are all
kept. float64 bits are turned into integers of the same order, and the search goes down 16 bits at a time: each pass
counts only the values that share the bits found so far, and stops as soon as they fit in memory.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

DIGIT_BITS = 16
PASSES = 64 // DIGIT_BITS
GATHERED = 2_000_000  # values that are fetched whole rather than counted once more: 16 MB


@dataclass(frozen=True)
class Search:
    """How far the search has come: `prefix` are the top `depth` digits of the wanted value.

    `rank` counts from the largest value (0) among those with the prefix; `total` is the number N of all values.
    `gather` says that few enough share the prefix to fetch them.
    """

    depth: int = 0
    prefix: int = 0
    rank: int | None = None  # unknown before the first pass, which finds N
    total: int = 0
    gather: bool = False


# What one worker found: bins and their counts, or the values themselves.
Part = tuple[np.ndarray, np.ndarray]


def sortable(values: np.ndarray) -> np.ndarray:
    """float64 (n,) without NaN to uint64 (n,) of the same order."""
    bits = np.ascontiguousarray(values, dtype=np.float64).view(np.uint64)
    sign = np.uint64(1 << 63)
    return np.where(bits & sign, ~bits, bits | sign)


def unsorted(bits: int) -> float:
    """The float64 of a `sortable` integer."""
    sign = 1 << 63
    plain = bits ^ sign if bits & sign else bits ^ (2**64 - 1)
    return float(np.array([plain], dtype=np.uint64).view(np.float64)[0])


def look(search: Search, values: np.ndarray) -> Part:
    """One worker's share of a pass over its values."""
    bits = sortable(values)
    if search.depth:
        shift = np.uint64(64 - DIGIT_BITS * search.depth)
        bits = bits[(bits >> shift) == np.uint64(search.prefix)]
    if not search.gather:
        bits = (bits >> np.uint64(64 - DIGIT_BITS * (search.depth + 1))) & np.uint64(2**DIGIT_BITS - 1)
    bins, counts = np.unique(bits, return_counts=True)
    return bins, counts


def merge(parts: Iterable[Part]) -> Part:
    """Sum the parts of two or more workers."""
    bins, counts = zip(*parts, strict=True)
    merged, places = np.unique(np.concatenate(bins), return_inverse=True)
    summed = np.zeros(len(merged), dtype=np.int64)
    np.add.at(summed, places, np.concatenate(counts))
    return merged, summed


def narrow(search: Search, found: Part, fraction: float) -> Search | float | None:
    """The next search, or the threshold when it is found; None when there are no values at all."""
    bins, counts = found
    if search.rank is None:
        total = int(counts.sum())
        if total == 0:
            return None
        search = replace(search, total=total, rank=min(int(total * fraction), total - 1))
    assert search.rank is not None
    falling = np.cumsum(counts[::-1])
    place = int(np.searchsorted(falling, search.rank, side="right"))
    above = int(falling[place - 1]) if place else 0
    chosen = int(bins[len(bins) - 1 - place])
    if search.gather:
        return unsorted(chosen)
    prefix = search.prefix << DIGIT_BITS | chosen
    depth = search.depth + 1
    if depth == PASSES:
        return unsorted(prefix)
    few = int(falling[place]) - above <= GATHERED
    return Search(depth, prefix, search.rank - above, search.total, few)


def resolve(fractions: Mapping[str, float], one_pass: Callable[[Mapping[str, Search]], Mapping[str, Part]]) -> dict[
    str, float | None
]:  # fmt: skip
    """The threshold of each fraction; `one_pass` lets every worker `look` and merges what they found."""
    open_ = {name: Search() for name in fractions}
    resolved: dict[str, float | None] = {}
    while open_:
        found = one_pass(open_)
        following: dict[str, Search] = {}
        for name, search in open_.items():
            result = narrow(search, found[name], fractions[name])
            if isinstance(result, Search):
                following[name] = result
            else:
                resolved[name] = result
        open_ = following
    return resolved

"""Which bits to sort by: the tables of block permutation, chosen from the data.

Two 64-bit hashes within Hamming distance r differ in at most r of any b blocks of bits (Manku, Jain, Das Sarma,
"Detecting Near-Duplicates for Web Crawling", WWW 2007, section 3). A table leaves some blocks out, moves the bits of
the others to the top, sorts, and compares only neighbours that share those top bits. Every pair is found when every
choice of r blocks lies inside the blocks that some table leaves out. The paper has a table for each choice of r blocks;
leaving out more than r, in a covering design, needs fewer tables for keys as long: 14 of 30 bits instead of 20 at
radius 3 (eight blocks, the 14 fours of the Steiner system S(3, 4, 8)), and steps between 4 tables and 10.

Real hashes are not uniform. `imagehash.phash` has exactly 32 bits set and its top bit always 1; logos on white share
most of their bits. So bits are dealt into blocks of equal entropy, and b is chosen by the collisions that a sample of
the hashes shows, not by 64 / b. A pair belongs to exactly one table (the first whose blocks agree), so that tables can
be worked anywhere and their results concatenated.

It refuses no hash: a poor plan costs time, never a pair.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt

HashArray = npt.NDArray[np.uint64]

BITS = 64
SAMPLE = 8_192  # 3e7 pairs: sees collision rates down to 3e-8 a block; larger changed no plan in bench_dedup
MAX_BLOCKS = 20
MAX_TABLES = 20_000
MAX_COVER = 400_000  # choices times sets of a covering design that is looked for: all of a radius take 0.1 s
# Measured on one core of an AMD EPYC (family 25, 2.6 GHz), numpy 2.4: permuting, sorting and scanning one hash, and
# comparing one candidate of a run. Only their ratio matters.
SORT_NS = 130.0
CANDIDATE_NS = 1.3


@dataclass(frozen=True)
class Tables:
    """A plan for one radius: disjoint blocks of bits, and which of them each table leaves out.

    Attributes:
        radius: largest Hamming distance of a pair.
        blocks: masks, disjoint, together all 64 bits. No block at all means: compare all with all.
        left_out: for each table the blocks that are not in its key; every `radius` blocks lie in one of them.
        predicted_ns: modelled time of one core for the hashes that the plan was made for.
        predicted_candidates: modelled number of comparisons.
    """

    radius: int
    blocks: tuple[int, ...]
    left_out: tuple[tuple[int, ...], ...]
    predicted_ns: float
    predicted_candidates: float

    def __len__(self) -> int:
        return len(self.left_out)

    @cached_property
    def _owner(self) -> npt.NDArray[np.int32]:
        """For each set of blocks that differ (a bit mask), the first table that leaves them all out."""
        owner = np.full(1 << len(self.blocks), -1, np.int32)
        for table in range(len(self) - 1, -1, -1):
            subsets = np.zeros(1, np.int64)
            for block in self.left_out[table]:
                subsets = np.concatenate([subsets, subsets | (1 << block)])
            owner[subsets] = table
        return owner

    def key_bits(self, table: int) -> int:
        """Count the bits that a table's sort key has."""
        return BITS - sum(self.blocks[block].bit_count() for block in self.left_out[table])

    def permute(self, hashes: HashArray, table: int) -> HashArray:
        """Move the table's key bits to the top of every hash; distances stay as they are.

        Hashes with equal top `key_bits(table)` bits are each other's candidates, so the top bits also say where a
        hash goes when a table is partitioned over workers.
        """
        return permute_bits(hashes, self._bit_order(table))

    def restore(self, permuted: HashArray, table: int) -> HashArray:
        """Undo `permute`."""
        return permute_bits(permuted, (BITS - 1 - np.argsort(self._bit_order(table)))[::-1])

    def owned(self, left: HashArray, right: HashArray, table: int) -> npt.NDArray[np.bool_]:
        """Tell which pairs (of hashes as given, not permuted) are this table's to report."""
        differ = left ^ right
        mask = np.zeros(len(differ), np.int64)
        for block, bits in enumerate(self.blocks):
            mask |= ((differ & np.uint64(bits)) != 0).astype(np.int64) << block
        return np.asarray(self._owner[mask] == table)

    def _bit_order(self, table: int) -> npt.NDArray[np.int64]:
        """Source bit (0 = lowest) of each target bit, from the highest target bit down."""
        left_out = self.left_out[table]
        keys = [block for block in range(len(self.blocks)) if block not in left_out]
        order = [bit for block in (*keys, *left_out) for bit in range(BITS) if self.blocks[block] >> bit & 1]
        return np.array(order, np.int64)


def plan_tables(hashes: HashArray, radius: int, *, n: int | None = None, pairs: float | None = None) -> Tables:
    """Choose the tables that find all pairs among hashes like these in the least time.

    Args:
        hashes: uint64[S], the distinct hashes or an unbiased sample of them.
        radius: largest Hamming distance, 1 … 10.
        n: how many distinct hashes there are when `hashes` is a sample.
        pairs: how many pairs are asked about, where it is not all of them.

    Returns:
        The plan; without blocks where comparing all with all is cheapest.
    """
    n = len(hashes) if n is None else n
    pairs = n * (n - 1) / 2 if pairs is None else pairs
    best = Tables(radius, (), (), pairs * CANDIDATE_NS, pairs)
    sample = np.sort(hashes)[:: max(1, len(hashes) // SAMPLE)]
    if len(sample) < 2:
        return best
    entropy = _bit_entropy(sample)
    dealt = {}
    for tables, count, size in _designs(radius):
        if tables * n * SORT_NS >= best.predicted_ns:
            break
        if count not in dealt:
            blocks = _deal(entropy, count)
            dealt[count] = blocks, np.log2([_collisions(sample, block, entropy) for block in blocks])
        blocks, collide = dealt[count]
        left_out = _cover(count, size, radius)
        key_rate = np.exp2(collide.sum() - collide[np.array(left_out)].sum(axis=1))
        candidates = float(pairs * key_rate.sum())
        cost = tables * n * SORT_NS + candidates * CANDIDATE_NS
        if cost < best.predicted_ns:
            best = Tables(radius, tuple(blocks), left_out, cost, candidates)
    return best


@cache
def _designs(radius: int) -> tuple[tuple[int, int, int], ...]:
    """(tables, blocks, blocks left out by each), fewest tables first, each with a longer key than those before it."""
    found = []
    for count in range(radius + 1, MAX_BLOCKS + 1):
        for size in range(radius, count):
            if size == radius:
                tables = comb(count, radius)
            elif comb(count, size) * comb(count, radius) <= MAX_COVER:
                tables = len(_cover(count, size, radius))
            else:
                continue
            if tables <= MAX_TABLES:
                found.append((tables, size / count, count, size))
    kept: list[tuple[int, int, int]] = []
    shortest = 1.0
    for tables, share, count, size in sorted(found):
        if share < shortest:
            shortest = share
            kept.append((tables, count, size))
    return tuple(kept)


@cache
def _cover(count: int, size: int, radius: int) -> tuple[tuple[int, ...], ...]:
    """Choices of `size` out of `count` blocks that hold every `radius` of them: the greedy covering design."""
    choices = list(combinations(range(count), size))
    if size == radius:
        return tuple(choices)
    masks = np.array([sum(1 << block for block in choice) for choice in choices])
    wanted = np.array([sum(1 << block for block in one) for one in combinations(range(count), radius)])
    holds = (masks[:, None] & wanted) == wanted
    chosen = []
    while holds.shape[1]:
        best = int(holds.sum(axis=1).argmax())  # the first of equals: lexicographic, which finds S(3, 4, 8)
        chosen.append(choices[best])
        holds = holds[:, ~holds[best]]
    return tuple(chosen)


def _bit_entropy(sample: HashArray) -> npt.NDArray[np.float64]:
    """-log2 of the chance that two hashes agree on a bit, per bit (0 = lowest)."""
    ones = np.array([((sample >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(BITS)])
    return np.asarray(-np.log2(ones**2 + (1 - ones) ** 2))


def _deal(entropy: npt.NDArray[np.float64], count: int) -> list[int]:
    """Deal the bits into blocks of about equal entropy: highest first, each to the poorest block."""
    blocks, total = [0] * count, np.zeros(count)
    for bit in np.argsort(-entropy, kind="stable"):
        poorest = int(np.argmin(total))
        blocks[poorest] |= 1 << int(bit)
        total[poorest] += entropy[bit] + 1e-9  # constant bits are dealt round too
    return blocks


def _collisions(sample: HashArray, block: int, entropy: npt.NDArray[np.float64]) -> float:
    """Chance that two hashes agree on a block: as the sample shows, and no less than independent bits would give."""
    values = np.sort(sample & np.uint64(block))
    edges = np.flatnonzero(np.r_[True, values[1:] != values[:-1], True])
    runs = np.diff(edges).astype(np.float64)
    seen = float((runs * (runs - 1)).sum() / (len(values) * (len(values) - 1.0)))
    independent = float(np.exp2(-sum(entropy[bit] for bit in range(BITS) if block >> bit & 1)))
    return max(seen, independent)


def permute_bits(hashes: HashArray, order: npt.NDArray[np.int64]) -> HashArray:
    """Rearrange the bits: eight look-ups of a byte each, in slices that stay in the cache."""
    target = np.empty(BITS, np.uint64)  # where each source bit goes
    target[order] = np.uint64(1) << np.arange(BITS - 1, -1, -1, dtype=np.uint64)
    codes = np.arange(256)
    lookup = [
        np.bitwise_or.reduce([np.where(codes >> bit & 1, target[byte * 8 + bit], np.uint64(0)) for bit in range(8)])
        for byte in range(8)
    ]
    result = np.empty(len(hashes), np.uint64)
    rows = 1 << 15
    for start in range(0, len(hashes), rows):
        part = np.ascontiguousarray(hashes[start : start + rows]).astype("<u8", copy=False)
        octets = part.view(np.uint8).reshape(-1, 8)
        out = result[start : start + rows]
        np.take(lookup[0], octets[:, 0], out=out)
        for byte in range(1, 8):
            out |= lookup[byte][octets[:, byte]]
    return result

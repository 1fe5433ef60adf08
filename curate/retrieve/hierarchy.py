"""Hierarchical k-means and balanced sampling: every concept gets its share, however rare it is in the pool.

Vo et al. 2024 (arXiv 2405.15613); the web-scale settings are those of DINOv3's predecessor recipes (RECIPES section 4).
Clusters of clusters are built level by level (`tree`); a target number of images is then shared out from the top, as
evenly as the clusters' sizes allow, and drawn. Everything is seeded. It refuses negative sizes and targets.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from curate.errors import PlanError
from curate.retrieve.draw import Smallest, ordered, ranks
from curate.vectors import Int64, UInt64, hashed

CHILDREN_PER_PASS = 1 << 20  # clusters whose quotas are searched together: 40 MB, whatever the tree's size


def quotas(sizes: npt.NDArray[Any], target: int, multiplier: int = 1, seed: int = 0) -> Int64:
    """How many images each cluster gives, int64[n], when all give the same number x or all that they have.

    x is the largest integer with sum(min(x, sizes · multiplier)) ≤ target, found by binary search; what is left of the
    target goes as +1 to clusters that have more than x, drawn by seed. The sum is min(target, sum(sizes · multiplier)).
    Raises PlanError for a negative size or target, or a multiplier below 1. Source: Vo et al. 2024, section 3.3.
    """
    sizes = _checked(sizes, target, multiplier)
    bounds = np.array([0, len(sizes)], dtype=np.int64)
    caps = _caps(sizes, target, multiplier)
    return _share(caps, bounds, np.array([target], dtype=np.int64), hashed(np.arange(len(sizes)), seed))


@dataclass(frozen=True, eq=False)
class Tree:
    """Clusters of clusters. `sizes` int64[n1] counts the images of each level-1 cluster; `parents[i]` gives, for each
    cluster of level i + 1, its cluster of level i + 2. No parents: one level, under one root."""

    sizes: Int64
    parents: tuple[npt.NDArray[Any], ...] = ()

    def __post_init__(self) -> None:
        below = len(self.sizes)
        for level, parents in enumerate(self.parents, start=1):
            if len(parents) != below:
                raise PlanError(f"tree: level {level} has {below} clusters but {len(parents)} parents")
            if below and int(parents.min()) < 0:
                raise PlanError(f"tree: a cluster of level {level} has no parent")
            below = int(parents.max()) + 1 if below else 0


def allocate(tree: Tree, target: int, multiplier: int = 1, seed: int = 0) -> Int64:
    """The quota of every level-1 cluster, int64[n1]: `quotas` at the root, then within each cluster, level by level.

    Sizes are flat (images under a node), as published. Memory: 8 bytes × about five arrays of the largest level.
    """
    flat = [_checked(tree.sizes, target, multiplier)]
    for parents in tree.parents:
        flat.append(_summed(flat[-1], parents))
    given = quotas(flat[-1], target, multiplier, seed)
    for level in range(len(tree.parents) - 1, -1, -1):
        parents, sizes = tree.parents[level], flat.pop(level)
        order = np.argsort(parents, kind="stable")
        bounds = np.concatenate(([0], np.cumsum(np.bincount(parents, minlength=len(given))))).astype(np.int64)
        draws = hashed(order, seed, salt=level + 1)
        shared = _share(_caps(sizes[order], target, multiplier), bounds, given, draws)
        given = np.empty_like(shared)
        given[order] = shared
    return given


def balanced(
    allocation: Int64,
    sizes: Int64,
    blocks: Iterable[tuple[Int64, npt.NDArray[Any], npt.NDArray[Any], UInt64]],
    how: Literal["random", "closest"],
    multiplier: int = 1,
    seed: int = 0,
) -> tuple[Int64, Int64]:
    """The images chosen under each level-1 cluster's quota: (rows int64[k], copies int64[k]), by row.

    `blocks` gives (rows, clusters, distances to the centroid, keys). "random": without replacement out of `multiplier`
    copies of every image. "closest": the nearest first, and a second copy only after every image had its first.
    Source: Vo et al. 2024; published as strategies `r` and `c`. Blocks may be of any size and in any order.
    """
    if how not in ("random", "closest"):
        raise PlanError(f"balanced: how is {how!r}; expected 'random' or 'closest'")
    _checked(sizes, 0, multiplier)
    passes, rest = np.divmod(allocation, np.maximum(sizes, 1))
    draw = Smallest(allocation if how == "random" else rest)
    whole: list[tuple[Int64, Int64]] = []  # closest with a multiplier: images that come `passes` times anyway
    for rows, clusters, distances, keys in blocks:
        if how == "closest":
            draw.add(clusters, ordered(distances), rows)
            times = np.where(clusters >= 0, passes[np.maximum(clusters, 0)], 0)
            whole.append((rows[times > 0], times[times > 0]))
            continue
        for copy in range(multiplier):
            draw.add(clusters, hashed(keys, seed, salt=copy), rows)
    chosen = draw.result()[1]
    rows = np.concatenate([chosen, *(part[0] for part in whole)])
    copies = np.concatenate([np.ones(len(chosen), np.int64), *(part[1] for part in whole)])
    unique, inverse = np.unique(rows, return_inverse=True)
    return unique, _summed(copies, inverse, len(unique))


def _checked(sizes: npt.NDArray[Any], target: int, multiplier: int) -> Int64:
    sizes = np.asarray(sizes, dtype=np.int64)
    if target < 0 or multiplier < 1 or (sizes < 0).any():
        raise PlanError(f"quotas: target {target} and sizes must not be negative, multiplier {multiplier} not below 1")
    return sizes


def _caps(sizes: Int64, target: int, multiplier: int) -> Int64:
    """min(sizes · multiplier, target), which no multiplier can overflow."""
    return np.where(sizes > target // multiplier, target, sizes * min(multiplier, max(target, 1)))


def _summed(values: Int64, groups: npt.NDArray[Any], count: int | None = None) -> Int64:
    """Sums by group, in integers: bincount's float64 weights would lose images beyond 2^53."""
    if count is None:
        count = int(groups.max()) + 1 if len(groups) else 0
    sums = np.zeros(count, dtype=np.int64)
    np.add.at(sums, groups, values)
    return sums


def _passes(bounds: Int64) -> Iterator[tuple[int, int]]:
    """Ranges of parents with about CHILDREN_PER_PASS children each."""
    first = 0
    while first < len(bounds) - 1:
        last = int(np.searchsorted(bounds, bounds[first] + CHILDREN_PER_PASS, side="right")) - 1
        last = min(max(last, first + 1), len(bounds) - 1)
        yield first, last
        first = last


def _share(caps: Int64, bounds: Int64, targets: Int64, draws: UInt64) -> Int64:
    """Shares targets int64[p] among each parent's children: caps[bounds[i] : bounds[i + 1]] are those of parent i."""
    shares = np.empty_like(caps)
    for first, last in _passes(bounds):
        part = slice(int(bounds[first]), int(bounds[last]))
        local = bounds[first : last + 1] - bounds[first]
        shares[part] = _share_pass(caps[part], local, targets[first:last], draws[part])
    return shares


def _share_pass(caps: Int64, bounds: Int64, targets: Int64, draws: UInt64) -> Int64:
    children = np.diff(bounds)
    parent = np.repeat(np.arange(len(children)), children)

    def given(level: Int64) -> Int64:
        sums = np.concatenate(([0], np.cumsum(np.minimum(caps, level[parent]))))
        return sums[bounds[1:]] - sums[bounds[:-1]]

    low = np.zeros(len(targets), dtype=np.int64)  # given(low) <= target always holds
    high = targets + 1  # and given(high) > target, unless all that is there is not enough
    high[given(targets) <= targets] = 0
    low[high == 0] = targets[high == 0]
    while (high - low > 1).any():
        middle = np.where(high - low > 1, (low + high) // 2, low)
        fits = given(middle) <= targets
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    level = low[parent]
    shares = np.minimum(caps, level)
    left = np.maximum(targets - given(low), 0)
    larger = np.flatnonzero(caps > level)
    order = larger[np.lexsort((draws[larger], parent[larger]))]
    shares[order[ranks(parent[order]) < left[parent[order]]]] += 1
    return shares

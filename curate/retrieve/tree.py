"""Balanced sampling under a tree whose lowest level is the pool's cells, or what they are split into.

    <work>/level<n>/…      passes over the centroids below, and what they gave (see `levels`)
    <work>/quotas.npz      images that each cluster of the lowest level is to give, for each target

Quotas are shared out in the process that drives the step, over sizes and parents alone: 12 bytes and about five arrays
of 8 for each cluster of the lowest level. Everything that reads vectors or images is done by any worker.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.config import HierarchySettings
from curate.errors import PlanError
from curate.metrics import Ticker
from curate.retrieve import by_cells, levels
from curate.retrieve.hierarchy import Tree, allocate
from curate.retrieve.levels import Centroids, KMeans
from curate.retrieve.partition import Place
from curate.retrieve.splits import Splits, split
from curate.schema import KEY, Shard, TableSpec
from curate.stage import Map
from curate.vectors import Pool, put_arrays

LEVEL_SEED = 104729  # apart, so that no level draws as another does


def sample(
    pool: Pool, place: Place, settings: HierarchySettings, points: Sequence[int], spec: TableSpec, work: str,
    shards: Sequence[Shard], map_items: Map, ticker: Ticker,
) -> Mapping[str, int]:  # fmt: skip
    """Write the table of all targets; images, copies included, by target. Raises PlanError for a level.

    `points`: of each level, how many points a cluster its k-means sees.
    """
    store = pool.store
    lowest: Place | Splits = place
    files: tuple[tuple[str, int], ...] = ((f"{place.folder}/centroids.npz", len(place.sizes(store))),)
    if settings.splits > 1:
        lowest = split(pool, place, settings, [shard.name for shard in shards], work, map_items)
        files = lowest.files(store)
    if not store.exists(f"{work}/quotas.npz"):
        parents = _parents(Centroids(store, pool.width, files), settings, points, work, map_items)
        tree = Tree(lowest.sizes(store), tuple(parents))
        shares = [allocate(tree, target, settings.multiplier, settings.seed) for target in settings.targets]
        put_arrays(store, f"{work}/quotas.npz", quotas=np.stack(shares))
    by_cells.sample(pool, lowest, settings, work, shards, map_items)
    counts: Counter[str] = Counter()
    for found in map_items(partial(_commit, pool, spec, work), list(shards)):
        counts.update(found)
        ticker.advance(1)
    return {name: counts[name] for name in spec.columns}


def _parents(
    below: Centroids, settings: HierarchySettings, points: Sequence[int], work: str, map_items: Map
) -> list[npt.NDArray[np.int32]]:
    """For each level above the lowest, the cluster in it of every centroid below."""
    counts = [int(below.starts[-1]), *(level.count for level in settings.levels)]
    if any(upper > lower for lower, upper in pairwise(counts)):
        raise PlanError(f"hierarchy.levels: {counts} clusters from the lowest upwards; each level needs fewer")
    parents = []
    for number, (level, seen) in enumerate(zip(settings.levels, points, strict=True), start=1):
        how = KMeans(
            level.count, "l2", "kmeans++", settings.iterations, seen,
            settings.seed + LEVEL_SEED * number, level.resampling, level.sample_size,
        )  # fmt: skip
        folder = f"{work}/level{number}"
        path = f"{folder}/centroids.npz"
        levels.train(below, how, path, folder, map_items)
        parents.append(levels.members(below, path, folder, map_items))
        below = Centroids(below.store, below.width, ((path, level.count),))
    return parents


def _commit(pool: Pool, spec: TableSpec, work: str, shard: Shard) -> Mapping[str, int]:
    if pool.store.has(spec, shard.name):  # by an earlier try, or by another run that has swept the draws away since
        told = pool.store.read(spec, shard.name, spec.columns)
        return {name: int(np.asarray(told[name]).sum()) for name in spec.columns}
    times = np.zeros((len(spec.columns), shard.rows), np.int32)
    rows, targets, copies = by_cells.drawn(pool.store, work, shard.name)
    times[targets, rows] = copies
    aligned = pool.columns[pool.by].table
    keys = pool.store.read(aligned, shard.name, [KEY.name]).column(KEY.name)
    columns = [pa.array(column, pa.int32()) for column in times]
    pool.store.write(spec, shard, pa.table([keys, *columns], schema=spec.schema), aligned_with=aligned)
    return dict(zip(spec.columns, times.sum(axis=1).tolist(), strict=True))

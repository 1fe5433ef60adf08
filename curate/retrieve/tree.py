"""Balanced sampling under a tree whose lowest level is the pool's cells: quotas once, draws cell by cell.

    <work>/quotas.npz      images that each cell is to give, for each target

The upper levels cluster the centroids of the cells, in the process that drives the step: 10 million centroids of 1024
numbers take 40 GB there. Images are drawn by any worker.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.config import HierarchySettings
from curate.errors import PlanError
from curate.metrics import Ticker
from curate.retrieve import by_cells
from curate.retrieve.hierarchy import Level, Tree, allocate, build
from curate.retrieve.partition import Place, device
from curate.schema import KEY, Shard, TableSpec
from curate.stage import Map
from curate.vectors import Pool, unless_there


def sample(
    pool: Pool, place: Place, settings: HierarchySettings, spec: TableSpec, work: str, shards: Sequence[Shard],
    map_items: Map, ticker: Ticker,
) -> Mapping[str, int]:  # fmt: skip
    """Write the table of all targets; images, copies included, by target."""
    unless_there(pool.store, f"{work}/quotas.npz", lambda: {"quotas": quotas(pool, place, settings)})
    by_cells.sample(pool, place, settings, work, shards, map_items)
    counts: Counter[str] = Counter()
    for found in map_items(partial(_commit, pool, spec, work), list(shards)):
        counts.update(found)
        ticker.advance(1)
    return {name: counts[name] for name in spec.columns}


def quotas(pool: Pool, place: Place, settings: HierarchySettings) -> npt.NDArray[np.int64]:
    """int64[targets, cells]: the share of every cell, from the top of the tree down. Raises PlanError for a level."""
    sizes, centroids = place.sizes(pool.store), place.cells(pool.store).centroids
    levels = [Level(level.count, 1, level.resampling, level.sample_size) for level in settings.levels]
    counts = [len(centroids), *(level.clusters for level in levels)]
    if any(upper > lower for lower, upper in itertools.pairwise(counts)):
        raise PlanError(f"hierarchy.levels: {counts} clusters from the cells upwards; each level needs fewer")
    built = build(
        centroids, levels, settings.iterations, settings.points_per_cell, settings.seed, device()
    ) if levels else []  # fmt: skip
    tree = Tree(sizes, tuple(level.members for level in built))
    return np.stack([allocate(tree, target, settings.multiplier, settings.seed) for target in settings.targets])


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

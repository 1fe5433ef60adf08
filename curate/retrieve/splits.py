"""The lowest level of a hierarchy where it is finer than the cells: every cell cut into clusters of its own.

    <work>/pool/<part>/<chunk>.npz        vectors of the pool, dealt by ranges of cells (see `partition`)
    <work>/clusters/<part>.npz            centroids
    <work>/placed/<part>.parquet          row, cluster and distance of every row of the part, in row order
    <work>/sizes/<part>.npz               rows in each cluster; the part is done
    <work>/finer/<shard>.npz              cluster and distance of a shard's rows

100,000 cells of 100 clusters each are Vo et al.'s ten million, which no single k-means could hold. As published, each
cell's k-means++ sees its own rows, they stay in it, and clusters that lose all their rows are left out. A worker holds
one range of cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curate.config import HierarchySettings
from curate.engine.driver import OnDevice
from curate.retrieve import cells as kernels
from curate.retrieve.cells import Cells
from curate.retrieve.levels import GPU_OF_A_PASS, device
from curate.retrieve.partition import Place, deal_pool, parts_of, read_part
from curate.stage import Map
from curate.store import Store
from curate.vectors import Int64, Pool, chunks_of, finish, get_arrays, hashed, put_arrays

PLACED = pa.schema([("row", pa.int64()), ("cluster", pa.int32()), ("distance", pa.float32())])
ROWS_PER_GROUP = 1 << 16  # a chunk of shards reads a few groups of a file
SHARDS_PER_RETURN = 200  # files of clusters are read once per this many shards


@dataclass(frozen=True)
class Splits:
    """Where the clusters of all cells lie, numbered through the parts; read like a `Place`."""

    work: str

    def files(self, store: Store) -> tuple[tuple[str, int], ...]:
        """(path of the centroids, clusters in it) of every part."""
        return tuple((f"{self.work}/clusters/{name}", len(sizes)) for name, sizes in self._sizes(store))

    def sizes(self, store: Store) -> Int64:
        """Rows in each cluster."""
        return np.concatenate([np.empty(0, np.int64), *(sizes for _, sizes in self._sizes(store))])

    def _sizes(self, store: Store) -> list[tuple[str, Int64]]:
        folder = f"{self.work}/sizes"
        return [(name, get_arrays(store, f"{folder}/{name}")["sizes"]) for name in store.names(folder)]

    def read(self, store: Store, shard: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """(cluster int32[n], -1 for none; distance float32[n], NaN for none) of a shard's rows."""
        held = get_arrays(store, f"{self.work}/finer/{shard}.npz")
        return held["clusters"], held["distances"]


def split(
    pool: Pool, place: Place, settings: HierarchySettings, shards: Sequence[str], work: str, map_items: Map
) -> Splits:
    """Cut every cell into at most `settings.splits` clusters; every pass writes only what is missing."""
    store, splits = pool.store, Splits(work)
    parts = parts_of(place.sizes(store), 2 * pool.width)
    deal_pool(pool, place, parts, work, map_items)
    done = set(store.names(f"{work}/sizes"))
    todo = [int(part) for part in store.names(f"{work}/pool") if f"{part}.npz" not in done]
    finish(map_items(OnDevice(partial(_split, store, settings, work), GPU_OF_A_PASS), todo))
    done = set(store.names(f"{work}/finer"))
    chunks = [chunk for chunk in chunks_of(len(shards), SHARDS_PER_RETURN)
              if any(f"{shards[number]}.npz" not in done for number in chunk)]  # fmt: skip
    finish(map_items(partial(_return, pool, splits, shards), chunks))
    return splits


def _split(store: Store, settings: HierarchySettings, work: str, part: int) -> None:
    rows, cells, vectors = read_part(store, work, part)
    order = np.lexsort((rows, cells))
    rows, cells, vectors = rows[order], cells[order], vectors[order]
    bounds = [0, *(np.flatnonzero(np.diff(cells)) + 1).tolist(), len(cells)]
    centroids = [np.empty((0, vectors.shape[1]), np.float32)]
    clusters, distances, count = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32), 0
    for start, stop in pairwise(bounds):
        if stop > start:
            mine = slice(start, stop)
            found, clusters[mine], distances[mine] = _clusters(vectors[mine], rows[mine], settings)
            clusters[mine] += count
            centroids.append(found)
            count += len(found)
    order = np.argsort(rows)
    placed = pa.table([rows[order], clusters[order], distances[order]], schema=PLACED)
    put_arrays(store, f"{work}/clusters/{part:05d}.npz", centroids=np.concatenate(centroids))
    with store.staged(f"{work}/placed/{part:05d}.parquet") as local:
        pq.write_table(placed, local, compression="zstd", row_group_size=ROWS_PER_GROUP)
    sizes = np.bincount(clusters, minlength=count).astype(np.int64)
    put_arrays(store, f"{work}/sizes/{part:05d}.npz", sizes=sizes)


def _clusters(
    vectors: npt.NDArray[np.float16], rows: Int64, settings: HierarchySettings
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """(centroids, the cluster of each row, its distance) of one cell; no cluster is empty."""
    seen = vectors
    if len(rows) > settings.splits * settings.points_per_cell:  # a cell of millions: k-means sees a draw of it
        marks = hashed(rows, settings.seed)
        seen = vectors[np.sort(np.argsort(marks, kind="stable")[: settings.splits * settings.points_per_cell])]
    count = min(settings.splits, len(seen))
    trained = kernels.train(seen, count, "l2", "kmeans++", settings.iterations, settings.seed, device())
    members, distances = next(kernels.assign(Cells(trained.centroids, "l2"), [vectors], device()))
    held, numbered = np.unique(members, return_inverse=True)
    return trained.centroids[held], numbered.astype(np.int32), distances


def _return(pool: Pool, splits: Splits, shards: Sequence[str], chunk: range) -> None:
    """The clusters of a chunk of shards, out of all parts."""
    store = pool.store
    first, last = pool.starts[chunk.start], pool.starts[chunk.stop]
    clusters, distances = np.full(last - first, -1, np.int32), np.full(last - first, np.nan, np.float32)
    before = 0
    names = store.names(f"{splits.work}/placed")
    for name, (_, count) in zip(names, splits.files(store), strict=True):
        with store.open(f"{splits.work}/placed/{name}") as handle:
            held = pq.read_table(handle, filters=[("row", ">=", first), ("row", "<", last)])
        rows = np.asarray(held["row"]) - first
        clusters[rows] = np.asarray(held["cluster"]) + before
        distances[rows] = np.asarray(held["distance"])
        before += count
    for number in chunk:
        mine = slice(pool.starts[number] - first, pool.starts[number + 1] - first)
        path = f"{splits.work}/finer/{shards[number]}.npz"
        put_arrays(store, path, clusters=clusters[mine], distances=distances[mine])

"""The cells of a pool as files in the store: trained once, assigned shard by shard, dealt out for searching.

    _cells/<fingerprint>/centroids.npz       float32[c, d]
    _cells/<fingerprint>/<count>/sizes.npz   of each cell: rows of a pool that take part, and the largest distance
    _cells/<fingerprint>/<count>/facts.json  rows, imbalance, empty cells, for people
    <work>/pool/<part>/<chunk>.npz           rows, cells and vectors of a chunk of shards, dealt by ranges of cells

Everything is an item of work for any worker, k-means too. No process holds more vectors than the sample that k-means
sees, a chunk of shards or a range of cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.config import CellsSettings
from curate.engine.driver import OnDevice
from curate.errors import PlanError
from curate.metrics import Ticker
from curate.retrieve import cells as kernels
from curate.retrieve import levels, vector_files
from curate.retrieve.cells import Cells
from curate.retrieve.levels import GPU_OF_A_PASS, KMeans, device
from curate.retrieve.search import Codes
from curate.schema import KEY, Shard, TableSpec
from curate.stage import Map
from curate.store import Store
from curate.vectors import Int64, Pool, chunks_of, finish, get_arrays, put_arrays

PART_BYTES = 1 << 31  # vectors searched in one task; twice that at the peak
RADIUS_DIGITS = 4


@dataclass(frozen=True)
class Place:
    """Where a partition lies, how its cells are found, and where the sizes of a pool's cells are."""

    spec: TableSpec
    metric: str
    count: str

    @property
    def folder(self) -> str:
        """What belongs to the whole pool rather than to a shard."""
        return f"_cells/{self.spec.fingerprint}"

    def cells(self, store: Store) -> Cells:
        """The centroids, loaded once a process."""
        return _load(store.root, f"{self.folder}/centroids.npz", self.metric)

    def sizes(self, store: Store) -> Int64:
        """Rows in each cell, of those that take part."""
        return np.asarray(get_arrays(store, f"{self.count}/sizes.npz")["sizes"], np.int64)

    def read(self, store: Store, shard: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """(cell int32[n], -1 for none; distance float32[n], NaN for none) of a shard's rows, of all that have one."""
        table = store.read(self.spec, shard, ["cell", "distance"])
        cell, distance = table["cell"].fill_null(-1), table["distance"].fill_null(float("nan"))
        return np.asarray(cell, dtype=np.int32), np.asarray(distance, dtype=np.float32)


@lru_cache(maxsize=2)
def _load(root: str, path: str, metric: Any) -> Cells:
    return Cells(get_arrays(Store(root), path)["centroids"], metric)


def prepare(
    founding: Pool, place: Place, settings: CellsSettings, points_per_cell: int, work: str, map_items: Map
) -> None:
    """Write the centroids: the recipe's own, or trained on a sample of the founders, so many for each cell."""
    path = f"{place.folder}/centroids.npz"
    if settings.centroids is None:
        how = KMeans(
            settings.count, settings.metric, settings.init, settings.iterations, points_per_cell,
            settings.seed, settings.resampling, settings.sample_size, settings.batch,
        )  # fmt: skip
        levels.train(founding, how, path, work, map_items)
    elif not founding.store.exists(path):
        count = vector_files.length_of(settings.centroids, None)
        centroids = vector_files.read_span(settings.centroids, None, 0, count).astype(np.float32)
        expected = (settings.count, founding.width)
        if centroids.shape != expected:
            raise PlanError(f"cells.centroids: {settings.centroids} is {centroids.shape}, expected {expected}")
        if not np.isfinite(centroids).all():
            raise PlanError(f"cells.centroids: {settings.centroids} holds numbers that are not finite in float32")
        if settings.metric == "cosine":
            centroids = kernels.unit(centroids)
        put_arrays(founding.store, path, centroids=centroids)


def assign_all(pool: Pool, place: Place, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
    """Write the table `cells` where it is missing, then sizes and facts of the whole partition."""
    count = len(place.cells(pool.store).centroids)
    sizes, radius, without = np.zeros(count, np.int64), np.full(count, -np.inf), 0
    assign = OnDevice(partial(_assign, pool, place), GPU_OF_A_PASS)
    for cells, rows, furthest, none in map_items(assign, list(enumerate(shards))):
        sizes[cells] += rows
        radius[cells] = np.maximum(radius[cells], furthest)
        without += none
        ticker.advance(1)
    radius[sizes == 0] = np.nan
    put_arrays(pool.store, f"{place.count}/sizes.npz", sizes=sizes, radius=radius)
    rows = int(sizes.sum())
    imbalance = count * float((sizes.astype(np.float64) ** 2).sum()) / rows**2 if rows else 0.0
    facts: dict[str, Any] = {
        "cells": count, "rows": rows, "rows_without_cell": without, "empty_cells": int((sizes == 0).sum()),
        "largest_cell": int(sizes.max()), "median_cell": int(np.median(sizes)), "imbalance": round(imbalance, 4),
        "largest_radius": round(float(np.nanmax(radius)), RADIUS_DIGITS) if rows else None,
    }  # fmt: skip
    pool.store.put_json(f"{place.count}/facts.json", facts)
    return {
        "rows in cells": rows, "rows without a cell": without, "cells": count, "empty cells": facts["empty_cells"],
        "largest cell": facts["largest_cell"], "imbalance × 100": round(100 * imbalance),
    }  # fmt: skip


def _assign(pool: Pool, place: Place, item: tuple[int, Shard]) -> tuple[Int64, Int64, npt.NDArray[np.float64], int]:
    """Assign a shard unless it is; of the rows that take part (cells with rows, their rows, their largest distances),
    and how many rows are in none."""
    number, shard = item
    if not pool.store.has(place.spec, shard.name):
        part = replace(pool, where=None).read(number)
        members = np.full(shard.rows, -1, np.int32)
        away = np.full(shard.rows, np.nan, np.float32)
        for cells, distances in kernels.assign(place.cells(pool.store), [part.vectors], device()):
            members[part.rows - pool.starts[number]] = cells
            away[part.rows - pool.starts[number]] = distances
        aligned = pool.columns[pool.by].table
        keys = pool.store.read(aligned, shard.name, [KEY.name]).column(KEY.name)
        none = members < 0
        arrays = [pa.array(members, pa.int32(), mask=none), pa.array(away, pa.float32(), mask=none)]
        pool.store.write(place.spec, shard, pa.table([keys, *arrays], schema=place.spec.schema), aligned_with=aligned)
    members, away = place.read(pool.store, shard.name)
    there = (members >= 0) & pool.taking_part(number)[1]
    cells, rows = np.unique(members[there], return_counts=True)
    furthest = np.full(len(cells), -np.inf)
    np.maximum.at(furthest, np.searchsorted(cells, members[there]), away[there].astype(np.float64))
    return cells.astype(np.int64), rows.astype(np.int64), furthest, int((~there).sum())


def parts_of(sizes: Int64, row_bytes: int) -> Int64:
    """For each cell the part int64[c] that it is searched in: ranges of cells with about PART_BYTES of vectors."""
    before = np.cumsum(sizes) - sizes
    _, parts = np.unique(before * row_bytes // PART_BYTES, return_inverse=True)
    return np.asarray(parts, np.int64)


def deal_pool(pool: Pool, place: Place, parts: Int64, work: str, map_items: Map, codec: str | None = None) -> None:
    """Write the vectors of every part of cells, chunk by chunk of shards; their codes where there is a codec."""
    done = set(pool.store.names(f"{work}/pool_dealt"))
    todo = [chunk for chunk in chunks_of(len(pool.names)) if f"{chunk.start:08d}.json" not in done]
    finish(map_items(partial(_deal, pool, place, parts, work, codec), todo))


def _deal(pool: Pool, place: Place, parts: Int64, work: str, codec: str | None, chunk: range) -> None:
    codes = None if codec is None else Codes.unpacked(get_arrays(pool.store, codec)["codec"])
    rows, cells, vectors = [], [], []
    for number in chunk:
        held = pool.read(number)
        members = place.read(pool.store, pool.names[number])[0][held.rows - pool.starts[number]]
        kept = members >= 0
        rows.append(held.rows[kept])
        cells.append(members[kept])
        vectors.append(held.vectors[kept] if codes is None else codes.encode(held.vectors[kept]))
    row, cell, vector = np.concatenate(rows), np.concatenate(cells), np.concatenate(vectors)
    part_of = parts[cell]
    for part in np.unique(part_of).tolist():
        mine = part_of == part
        path = f"{work}/pool/{part:05d}/{chunk.start:08d}.npz"
        put_arrays(pool.store, path, rows=row[mine], cells=cell[mine], vectors=vector[mine])
    pool.store.put_json(f"{work}/pool_dealt/{chunk.start:08d}.json", {"rows": len(row)})


def read_part(store: Store, work: str, part: int) -> tuple[Int64, npt.NDArray[np.int32], npt.NDArray[Any]]:
    """(rows, cells, vectors or codes) of a part."""
    folder = f"{work}/pool/{part:05d}"
    held = [get_arrays(store, f"{folder}/{name}") for name in store.names(folder)]
    rows, cells, vectors = (np.concatenate([piece[name] for piece in held]) for name in ("rows", "cells", "vectors"))
    return rows, cells, vectors

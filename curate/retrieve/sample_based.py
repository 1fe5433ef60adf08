"""Sample-based retrieval over a pool of any size: every part of the pool meets the seeds that probe its cells.

    <work>/sets/<set>/found/<chunk>/<part>.npz     neighbours of a chunk of seeds in one part of the pool
    <work>/sets/<set>/truth/<part>.npz             exact neighbours of the watched seeds there
    <work>/sets/<set>/lists/<chunk>.npz            the k nearest of the watched seeds among a chunk's
    <work>/hits/<set>-<chunk>.parquet              pool rows that a chunk of seeds retrieves, in row order

With `codes`, parts hold codes and `coded` compares exactly. A seed that is itself a row of the pool does not retrieve
itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curate.config import SeedSet
from curate.engine.driver import OnDevice
from curate.retrieve import coded
from curate.retrieve import search as kernels
from curate.retrieve.levels import GPU_OF_A_PASS, device
from curate.retrieve.partition import deal_pool, read_part
from curate.retrieve.search import CellBlock, Codes, Neighbours, by_cell, exact, merged, recall
from curate.retrieve.seeds import Retrieval, chunk_names
from curate.stage import Map
from curate.store import Store
from curate.vectors import Int64, finish, get_arrays, put_arrays

HITS = pa.schema([
    ("row", pa.int64()), ("set", pa.int32()), ("similarity", pa.float32()), ("rank", pa.int32()), ("times", pa.int32()),
])  # fmt: skip
HITS_PER_GROUP = 1 << 16  # a chunk of shards reads a few groups of a file of hits


def retrieve(work: Retrieval, map_items: Map) -> Mapping[str, tuple[int, float | None]]:
    """Write the hits of all sample sets; (images retrieved, recall@k of the watched seeds) by set."""
    sets = work.named("sample")
    if not sets:
        return {}
    store = work.pool.store
    coded.train(work, map_items)
    deal_pool(work.pool, work.place, work.parts, work.work, map_items, coded.codec_path(work))
    done = set(store.names(f"{work.work}/searched"))
    parts = [name for name in store.names(f"{work.work}/pool") if f"{name}.json" not in done]
    finish(map_items(OnDevice(partial(_search, work), GPU_OF_A_PASS), [int(part) for part in parts]))
    if work.settings.codes:
        coded.rescore(work, map_items)
    results: dict[str, tuple[int, float | None]] = {}
    for one in sets:
        items = [int(name.removesuffix(".npz")) for name in chunk_names(work, one)]
        retrieved = sum(map_items(partial(_merge, work, one), items))
        results[one.name] = (retrieved, _recall(work, one))
    return results


def _search(work: Retrieval, part: int) -> None:
    """One part of the pool: all seeds of all sets that probe it."""
    store, codec = work.pool.store, coded.codec_path(work)
    rows, cells, vectors = read_part(store, work.work, part)
    codes = None if codec is None else coded.load(store, codec)
    blocks = _Blocks(list(by_cell(cells, rows, vectors)), codes)
    del vectors
    for one in work.named("sample"):
        k = min(work.width_of(one) * (work.settings.rerank if codes else 1), work.pool.starts[-1])
        folder = f"{work.folder(one)}/seeds/{part:05d}"
        for name in store.names(folder):
            held = get_arrays(store, f"{folder}/{name}")
            found = kernels.search(held["vectors"], held["probes"], blocks, k, device())
            kind = "coarse" if codes else "found"
            path = f"{work.folder(one)}/{kind}/{name.removesuffix('.npz')}/{part:05d}.npz"
            put_arrays(store, path, numbers=held["numbers"], rows=found.rows, similarity=found.similarity)
        if codes is None:  # else the truth is found where the vectors are
            watched = get_arrays(store, f"{work.folder(one)}/watched.npz")
            truth = exact(watched["vectors"], blocks, k, device())
            path = f"{work.folder(one)}/truth/{part:05d}.npz"
            put_arrays(store, path, rows=truth.rows, similarity=truth.similarity)
    store.put_json(f"{work.work}/searched/{part:05d}.json", {"rows": len(rows)})


@dataclass(frozen=True)
class _Blocks:
    """Blocks of a part, as often as they are asked for; codes are decoded a block at a time."""

    held: Sequence[CellBlock]
    codes: Codes | None

    def __iter__(self) -> Iterator[CellBlock]:
        for cell, rows, vectors in self.held:
            yield cell, rows, vectors if self.codes is None else self.codes.decode(vectors)


def _merge(work: Retrieval, one: SeedSet, chunk: int) -> int:
    """The k nearest of each seed of a chunk, from all parts; how many images they are."""
    store, name = work.pool.store, f"{chunk:010d}"
    own = get_arrays(store, f"{work.folder(one)}/met/{name}.npz")["own"]
    best = coded.best_of(store, f"{work.folder(one)}/found/{name}", len(own), work.width_of(one))
    best = _without_own(best, own, one.k)
    watched = get_arrays(store, f"{work.folder(one)}/watched.npz")
    mine = np.flatnonzero(watched["chunks"] == chunk)
    put_arrays(store, f"{work.folder(one)}/lists/{name}.npz", places=mine, rows=best.rows[watched["numbers"][mine]])
    seed, place = np.nonzero(best.rows >= 0)
    number = work.settings.sets.index(one)
    put_hits(store, f"{work.work}/hits/{one.name}-{name}.parquet",
             _by_row(best.rows[seed, place], number, best.similarity[seed, place], place + 1))  # fmt: skip
    return len(seed)


def _without_own(found: Neighbours, own: Int64, k: int) -> Neighbours:
    """Lists of k from lists that may hold the seed itself."""
    last = np.argsort(found.rows == np.where(own >= 0, own, -2)[:, None], axis=1, kind="stable")
    rows = np.take_along_axis(found.rows, last, axis=1)
    similarity = np.take_along_axis(found.similarity, last, axis=1)
    rows = np.where(rows == np.where(own >= 0, own, -2)[:, None], -1, rows)
    return Neighbours(rows[:, :k], np.where(rows < 0, np.nan, similarity)[:, :k])


def _by_row(rows: Int64, number: int, similarity: npt.NDArray[Any], rank: Int64) -> pa.Table:
    """One line for a pool row: its best similarity and rank, and how many seeds found it."""
    order = np.argsort(rows, kind="stable")
    unique, starts, times = np.unique(rows[order], return_index=True, return_counts=True)
    best = np.maximum.reduceat(similarity[order], starts) if len(unique) else np.empty(0)
    first = np.minimum.reduceat(rank[order], starts) if len(unique) else np.empty(0)
    columns = (unique, np.full(len(unique), number), best, first, times)
    arrays = [
        pa.array(column.astype(field.type.to_pandas_dtype())) for column, field in zip(columns, HITS, strict=True)
    ]
    return pa.table(arrays, schema=HITS)


def put_hits(store: Store, path: str, hits: pa.Table) -> None:
    """Write hits in row order, so that a reader of some shards skips the rest."""
    with store.staged(path) as local:
        pq.write_table(hits, local, compression="zstd", row_group_size=HITS_PER_GROUP)


def _recall(work: Retrieval, one: SeedSet) -> float | None:
    """recall@k of the watched seeds; None where none is watched."""
    store = work.pool.store
    watched = get_arrays(store, f"{work.folder(one)}/watched.npz")
    if not len(watched["own"]):
        return None
    k = work.width_of(one)
    parts = [get_arrays(store, f"{work.folder(one)}/truth/{name}") for name in store.names(f"{work.folder(one)}/truth")]
    truth = merged([Neighbours(part["rows"], part["similarity"]) for part in parts], k)
    truth = _without_own(truth, watched["own"], one.k)
    rows = np.full(truth.rows.shape, -1, np.int64)
    for name in store.names(f"{work.folder(one)}/lists"):
        held = get_arrays(store, f"{work.folder(one)}/lists/{name}")
        rows[held["places"]] = held["rows"]
    return recall(Neighbours(rows, truth.similarity), truth)

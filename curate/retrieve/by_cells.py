"""What cells decide over a pool of any size: cluster-based retrieval, and balanced sampling under a tree of cells.

Rows of a cell are brought together by `curate.across`, wherever they stand; a verdict is (shard, row, number of the set
or target, how often). A set's cap is one bound over all of its rows, found from the hashes that the cut goes by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.across import ROW, SHARD, VALUE, decide_across, verdicts_on
from curate.config import HierarchySettings, SeedSet
from curate.retrieve.clusters import ClusterRetrieval, seeded
from curate.retrieve.hierarchy import balanced
from curate.retrieve.partition import Place
from curate.retrieve.seeds import Met, Retrieval
from curate.retrieve.splits import Splits
from curate.schema import KEY, Shard
from curate.stage import Map
from curate.store import Store
from curate.vectors import Int64, Pool, UInt64, chunks_of, get_arrays, hashed, key_numbers, put_arrays

VERDICT = pa.schema([SHARD, ROW, ("set", pa.int32()), ("times", pa.int32())])
CUT = 1  # salt of the cut at the cap, as in `ClusterRetrieval.result`


@dataclass(frozen=True)
class Chosen:
    """What a cluster set retrieves: cells with seeds enough, images in them before the cap, and after it."""

    cells: int
    before_cap: int
    kept: int


def retrieve(work: Retrieval, met: Mapping[str, Met], shards: Sequence[Shard], map_items: Map) -> Mapping[str, Chosen]:
    """Decide for all cluster sets; `verdicts` then gives the images of a shard."""
    sets = work.named("cluster")
    if not sets:
        return {}
    store, folder = work.pool.store, f"{work.work}/clusters"
    chosen = np.stack([seeded(met[one.name].seeded, one.more_than) for one in sets])
    put_arrays(store, f"{folder}/chosen.npz", chosen=chosen)
    candidates = partial(_in_chosen_cells, work.pool, work.place, folder)
    decide_across(store, folder, shards, map_items, candidates, partial(_draw, work, folder))
    caps = np.array([one.cap or np.iinfo(np.int64).max for one in sets])
    marks: list[UInt64] = [np.empty(0, np.uint64) for _ in sets]
    before = np.zeros(len(sets), np.int64)
    for counts, parts in map_items(partial(_marks, work, folder, caps), chunks_of(len(shards))):
        before += counts
        marks = [np.sort(np.concatenate(pair))[:cap] for *pair, cap in zip(marks, parts, caps, strict=True)]
    bounds = [int(mark[-1]) if len(mark) else 0 for mark in marks]
    store.put_json(f"{folder}/bounds.json", bounds)
    return {
        one.name: Chosen(int(cells.sum()), int(count), len(mark))
        for one, cells, count, mark in zip(sets, chosen, before, marks, strict=True)
    }


def verdicts(work: Retrieval, number: int) -> tuple[Int64, Int64]:
    """(rows in the shard, index of the set among the recipe's) that cluster sets retrieve of a shard."""
    folder, sets = f"{work.work}/clusters", work.named("cluster")
    if not sets:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    bounds = np.array(work.pool.store.get_json(f"{folder}/bounds.json"), np.uint64)
    rows, one, marks = _read(work, folder, number)
    kept = marks <= bounds[one]
    places = np.array([work.settings.sets.index(each) for each in sets])
    return rows[kept], places[one[kept]]


def _in_chosen_cells(pool: Pool, place: Place, folder: str, shard: str) -> pa.Table:
    chosen: npt.NDArray[np.bool_] = np.any(get_arrays(pool.store, f"{folder}/chosen.npz")["chosen"], axis=0)
    table = rows_by_cell(pool, place, shard)
    return table.filter(pa.array(chosen[np.asarray(table["cell"])]))


def rows_by_cell(pool: Pool, place: Place | Splits, shard: str) -> pa.Table:
    """row_, value_ (what brings a cell together), cell, distance and the first 64 bits of the key, of the rows with a
    cell that take part."""
    table, taking_part = pool.taking_part(pool.names.index(shard))
    keys = key_numbers(table[KEY.name].to_pylist())
    cells, distances = place.read(pool.store, shard)
    rows = np.flatnonzero((cells >= 0) & taking_part)
    names = {cell: blake2b(str(cell).encode(), digest_size=16).digest() for cell in np.unique(cells[rows]).tolist()}
    values = [names[cell] for cell in cells[rows].tolist()]
    return pa.table({
        ROW.name: pa.array(rows, ROW.type), VALUE.name: pa.array(values, VALUE.type),
        "cell": pa.array(cells[rows], pa.int64()), "distance": pa.array(distances[rows], pa.float32()),
        "mark": pa.array(keys[rows], pa.uint64()),
    })  # fmt: skip


def _numbered(starts: Sequence[int], table: pa.Table) -> Int64:
    return np.asarray(np.asarray(starts, np.int64)[np.asarray(table[SHARD.name])] + np.asarray(table[ROW.name]))


def _verdict(starts: Sequence[int], rows: Int64, number: int, times: Int64) -> pa.Table:
    shard = np.searchsorted(np.asarray(starts), rows, side="right") - 1
    columns = (shard, rows - np.asarray(starts, np.int64)[shard], np.full(len(rows), number), times)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, VERDICT, strict=True)]
    return pa.table(arrays, schema=VERDICT)


def _in_order(parts: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables([VERDICT.empty_table(), *parts]).sort_by(
        [(SHARD.name, "ascending"), (ROW.name, "ascending")]
    )


def _draw(work: Retrieval, folder: str, table: pa.Table) -> pa.Table:
    """Each set's images of the cells that met here, before any cap."""
    chosen = get_arrays(work.pool.store, f"{folder}/chosen.npz")["chosen"]
    cells, keys = np.asarray(table["cell"]), np.asarray(table["mark"])
    rows, parts = _numbered(work.pool.starts, table), []
    for number, one in enumerate(work.named("cluster")):
        every = max(len(rows), 1)
        draw = ClusterRetrieval(chosen[number], min(one.per_cell or every, every), every, _seed(work, one))
        draw.add(cells, rows, keys)
        found = draw.result().rows
        parts.append(_verdict(work.pool.starts, found, number, np.ones(len(found), np.int64)))
    return _in_order(parts)


def _read(work: Retrieval, folder: str, number: int) -> tuple[Int64, Int64, UInt64]:
    """(rows in the shard, index of the cluster set, hash that the cap goes by)."""
    told = verdicts_on(work.pool.store, folder, work.pool.names[number])
    rows, sets = np.asarray(told[ROW.name]), np.asarray(told["set"])
    marks = np.empty(len(rows), np.uint64)
    for place, one in enumerate(work.named("cluster")):
        mine = sets == place
        marks[mine] = hashed(rows[mine] + work.pool.starts[number], _seed(work, one), salt=CUT)
    return rows, sets, marks


def _seed(work: Retrieval, one: SeedSet) -> int:
    """Two sets with a cell in common draw apart, whatever their order in the recipe."""
    return work.settings.seed + crc32(one.name.encode())


def _marks(work: Retrieval, folder: str, caps: Int64, chunk: range) -> tuple[Int64, list[UInt64]]:
    held = [_read(work, folder, number) for number in chunk]
    one, marks = np.concatenate([part[1] for part in held]), np.concatenate([part[2] for part in held])
    counts = np.bincount(one, minlength=len(caps)).astype(np.int64)
    return counts, [np.sort(marks[one == number])[:cap] for number, cap in enumerate(caps)]


def sample(
    pool: Pool, place: Place | Splits, settings: HierarchySettings, work: str, shards: Sequence[Shard], map_items: Map
) -> None:
    """Draw each target's images under the quotas in `<work>/quotas.npz`; `drawn` then gives those of a shard."""
    candidates = partial(rows_by_cell, pool, place)
    decide_across(pool.store, work, shards, map_items, candidates, partial(_balance, pool, place, settings, work))


def drawn(store: Store, work: str, shard: str) -> tuple[Int64, Int64, Int64]:
    """(rows in the shard, index of the target, copies)."""
    told = verdicts_on(store, work, shard)
    columns: list[Any] = [np.asarray(told[name]) for name in (ROW.name, "set", "times")]
    return columns[0], columns[1], columns[2]


def _balance(pool: Pool, place: Place | Splits, settings: HierarchySettings, work: str, table: pa.Table) -> pa.Table:
    quotas = get_arrays(pool.store, f"{work}/quotas.npz")["quotas"]
    cells, distances, keys = (np.asarray(table[name]) for name in ("cell", "distance", "mark"))
    rows, sizes, parts = _numbered(pool.starts, table), place.sizes(pool.store), []
    here = np.zeros(len(sizes), bool)
    here[cells] = True
    for number in range(len(settings.targets)):
        allocation = np.where(here, quotas[number], 0)
        blocks = [(rows, cells, distances, keys)]
        found, times = balanced(allocation, sizes, blocks, settings.how, settings.multiplier, settings.seed)
        parts.append(_verdict(pool.starts, found, number, times))
    return _in_order(parts)

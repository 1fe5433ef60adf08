"""The table `retrieved`, shard by shard: which sets retrieve a row, how near, how often; and what came of it all.

    _retrieved/<fingerprint>/table.json     the sets with their own counts, as DINOv2's table 15 has them

A row that no set retrieves has empty lists. Similarity and rank are null for sets that go by cells or as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curate.config import SeedSet
from curate.metrics import Ticker
from curate.retrieve.by_cells import Chosen, verdicts
from curate.retrieve.clusters import diversity
from curate.retrieve.sample_based import HITS
from curate.retrieve.seeds import Met, Retrieval
from curate.schema import KEY, Shard, TableSpec
from curate.stage import Map
from curate.vectors import Int64, chunks_of

SHARDS_PER_RETURN = 200  # files of hits are read once per this many shards


@dataclass(frozen=True)
class Counts:
    """What a chunk of shards holds: rows and times by set, rows retrieved at all, and retrieved rows in each cell."""

    rows: Int64
    times: Int64
    retrieved: int
    cells: Int64
    in_cell: Int64


def write_all(
    work: Retrieval, spec: TableSpec, shards: Sequence[Shard], map_items: Map, ticker: Ticker
) -> tuple[Counts, dict[str, Any]]:
    """Write the table; (counts of all shards, how widely the retrieved images are spread)."""
    sets, in_cell = len(work.settings.sets), np.zeros(len(work.parts), np.int64)
    whole = Counts(np.zeros(sets, np.int64), np.zeros(sets, np.int64), 0, np.empty(0, np.int64), in_cell)
    for chunk in map_items(partial(_gather, work, spec, shards), chunks_of(len(shards), SHARDS_PER_RETURN)):
        in_cell[chunk.cells] += chunk.in_cell
        whole = replace(
            whole, rows=whole.rows + chunk.rows, times=whole.times + chunk.times,
            retrieved=whole.retrieved + chunk.retrieved,
        )  # fmt: skip
        ticker.advance(1)
    spread = diversity(in_cell)
    return whole, {"cells_covered": spread.covered, "effective_cells": round(spread.effective, 2)}


def table_of(
    work: Retrieval, met: Mapping[str, Met], sampled: Mapping[str, tuple[int, float | None]],
    clustered: Mapping[str, Chosen], counts: Counts, spread: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """DINOv2's table 15 with our counts: a line a set; `retrieved` is before the cap, `final` what the set gives."""
    lines = []
    for number, one in enumerate(work.settings.sets):
        line: dict[str, Any] = {"set": one.name, "how": one.how, "different_images": int(counts.rows[number])}
        if one.how == "as_is":
            line |= {"seeds": line["different_images"], "retrieved": None, "final": line["different_images"]}
        elif one.how == "sample":
            retrieved, recall = sampled[one.name]
            final = line["different_images"] if work.settings.count_once else retrieved
            line |= {"seeds": met[one.name].seeds, "retrieved": retrieved, "final": final, "k": one.k}
            line["recall"] = None if recall is None else round(recall, 4)
        else:
            chosen = clustered[one.name]
            line |= {"seeds": met[one.name].seeds, "retrieved": chosen.before_cap, "final": chosen.kept}
            line["cells"] = chosen.cells
        lines.append(line)
    total = sum(line["final"] for line in lines)
    for line in lines:
        line["share"] = round(line["final"] / total, 4) if total else 0.0
    return {"sets": lines, "final": total, "different_images": counts.retrieved, **spread}


def _gather(work: Retrieval, spec: TableSpec, shards: Sequence[Shard], chunk: range) -> Counts:
    """Write the shards of a chunk that are missing; count them all."""
    store, sets = work.pool.store, len(work.settings.sets)
    hits = None
    rows, times, retrieved = np.zeros(sets, np.int64), np.zeros(sets, np.int64), 0
    in_cell = np.zeros(len(work.parts), np.int64)
    for number in chunk:
        if hits is None:
            hits = _hits(work, chunk)
        events = _events(work, hits, number)
        if not store.has(spec, shards[number].name):
            _write(work, spec, shards[number], events)
        np.add.at(rows, events["set"], 1)
        np.add.at(times, events["set"], events["times"])
        found = np.unique(events["row"])
        retrieved += len(found)
        members = work.place.read(store, shards[number].name)[0][found]
        np.add.at(in_cell, members[members >= 0], 1)
    cells = np.flatnonzero(in_cell)
    return Counts(rows, times, retrieved, cells, in_cell[cells])


def _hits(work: Retrieval, chunk: range) -> pa.Table:
    """What sample sets found in these shards."""
    store, parts = work.pool.store, [HITS.empty_table()]
    near = [("row", ">=", work.pool.starts[chunk.start]), ("row", "<", work.pool.starts[chunk.stop])]
    for name in store.names(f"{work.work}/hits"):
        with store.open(f"{work.work}/hits/{name}") as handle:
            parts.append(pq.read_table(handle, filters=near))
    return pa.concat_tables(parts)


def _events(work: Retrieval, hits: pa.Table, number: int) -> dict[str, npt.NDArray[Any]]:
    """One line for each row of a shard and set that retrieves it, by row, then set."""
    first, last = work.pool.starts[number], work.pool.starts[number + 1]
    row = np.asarray(hits["row"])
    mine = (row >= first) & (row < last)
    names = ("set", "similarity", "rank", "times")
    found = [{"row": row[mine] - first, **{name: np.asarray(hits[name])[mine] for name in names}}]
    rows, sets = verdicts(work, number)
    found.append(_plain(rows, sets))
    for place, one in enumerate(work.settings.sets):
        if one.how == "as_is":
            found.append(_plain(as_is(work, one, number), place))
    joined = {name: np.concatenate([part[name] for part in found]) for name in ("row", *names)}
    return _best(joined)


def as_is(work: Retrieval, one: SeedSet, number: int) -> Int64:
    """Rows of a shard that a set names, with an image; their vectors do not matter."""
    return np.flatnonzero(replace(work.pool, where=one.where).taking_part(number)[1])


def _plain(rows: Int64, sets: Any) -> dict[str, npt.NDArray[Any]]:
    there = np.broadcast_to(np.asarray(sets), rows.shape)
    return {
        "row": rows, "set": there, "similarity": np.full(len(rows), np.nan), "rank": np.zeros(len(rows), np.int64),
        "times": np.ones(len(rows), np.int64),
    }  # fmt: skip


def _best(events: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Lists of different chunks of seeds put together: nearest similarity and rank, and the sum of times."""
    order = np.lexsort((events["set"], events["row"]))
    ordered = {name: values[order] for name, values in events.items()}
    fresh = np.ones(len(order), bool)
    fresh[1:] = (np.diff(ordered["row"]) != 0) | (np.diff(ordered["set"]) != 0)
    starts = np.flatnonzero(fresh)
    if not len(starts):
        return ordered
    return {
        "row": ordered["row"][starts].astype(np.int64), "set": ordered["set"][starts].astype(np.int64),
        "similarity": np.fmax.reduceat(ordered["similarity"], starts),
        "rank": np.minimum.reduceat(ordered["rank"], starts),
        "times": np.add.reduceat(ordered["times"], starts),
    }  # fmt: skip


def _write(work: Retrieval, spec: TableSpec, shard: Shard, events: Mapping[str, npt.NDArray[Any]]) -> None:
    store, aligned = work.pool.store, work.pool.columns[work.pool.by].table
    offsets = pa.array(np.searchsorted(events["row"], np.arange(shard.rows + 1)), pa.int32())
    there = np.diff(np.asarray(offsets))
    times = np.ones(len(events["times"]), np.int64) if work.settings.count_once else events["times"]
    counted = np.bincount(events["row"], weights=times, minlength=shard.rows)
    names = np.array([one.name for one in work.settings.sets], dtype=object)
    near = events["rank"] == 0  # no rank: not found by nearness
    values = (
        pa.array(names[events["set"].astype(np.int64)].tolist(), pa.string()),
        pa.array(events["similarity"].astype(np.float32), pa.float32(), mask=near),
        pa.array(events["rank"].astype(np.int32), pa.int32(), mask=near),
        pa.array(events["times"].astype(np.int32), pa.int32()),
    )
    lists = [pa.ListArray.from_arrays(offsets, value) for value in values]
    keys = store.read(aligned, shard.name, [KEY.name]).column(KEY.name)
    columns = [keys, pa.array(there > 0), *lists, pa.array(counted.astype(np.int32), pa.int32())]
    store.write(spec, shard, pa.table(columns, schema=spec.schema), aligned_with=aligned)

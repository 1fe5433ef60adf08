"""Groups of near-equal pHashes over all shards, as files in the store that the step turns into verdicts.

    <rule>/hashes/<table>/<partition>/<chunk>.npy   (hash, row) of a chunk of shards, dealt by a table's key
    <rule>/edges/<table>-<partition>.npz            pairs within the radius, and their distance
    <rule>/near.npz                                 every row that has an edge, its group, its nearest distance
    <rule>/groups/<shard>.npz                       the same, shard by shard

Rows are numbered across the pool in the order of its shards. All tables and partitions together find every pair within
the radius (`hamming.edges_in_table`), so groups are exact whatever their number. Memory is bounded by a partition, and
at the end by the rows that have an edge.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.dedup.components import stream_groups
from curate.dedup.hamming import edges_in_table, edges_within
from curate.dedup.hamming_tables import Tables, plan_tables
from curate.schema import Shard
from curate.stage import Map
from curate.store import Store

ROWS_PER_TASK = 16_000_000  # hashes compared in one task: 0.3 GB of hashes and row numbers, 1 GB at the peak
SHARDS_PER_CHUNK = 200
SAMPLED_SHARDS = 64  # the plan looks at the bits of these

_HASHED = np.dtype([("hash", np.uint64), ("row", np.int64)])
IntArray = npt.NDArray[np.int64]
# (hashes, row numbers in the shard) of the rows of a shard that take part.
Candidates = Callable[[str], tuple[npt.NDArray[np.uint64], IntArray]]


@dataclass(frozen=True)
class Near:
    """One rule's search: where its files are, who takes part, how far apart two may be."""

    store: Store
    folder: str
    candidates: Candidates
    radius: int
    names: tuple[str, ...]
    starts: tuple[int, ...]  # number of each shard's first row

    def place(self, path: str) -> str:
        """A path below the rule's folder."""
        return f"{self.folder}/{path}"


def group_hashes(search: Near, shards: Sequence[Shard], map_items: Map) -> None:
    """Write `groups/<shard>.npz` for every shard. What is there already is not made again."""
    rows = sum(shard.rows for shard in shards)
    parts = max(1, 1 << max(0, (-(-rows // ROWS_PER_TASK) - 1).bit_length()))
    tables = _plan(search, rows)
    whole = parts == 1 or len(tables) == 0
    chunks = [range(at, min(at + SHARDS_PER_CHUNK, len(shards))) for at in range(0, len(shards), SHARDS_PER_CHUNK)]
    plan = None if whole else tables
    _all(
        map_items(
            partial(_deal, search, plan, parts), _missing(search, "dealt", [f"{c.start}.json" for c in chunks], chunks)
        )
    )
    tasks = [(0, 0)] if whole else [(table, part) for table in range(len(tables)) for part in range(parts)]
    todo = _missing(search, "edges", [f"{table:04d}-{part:05d}.npz" for table, part in tasks], tasks)
    _all(map_items(partial(_find, search, plan), todo))
    if not search.store.exists(search.place("near.npz")):
        _merge(search)
    _all(map_items(partial(_spread, search, rows), chunks))


def read_groups(store: Store, folder: str, shard: str) -> tuple[IntArray, IntArray, npt.NDArray[np.uint8]]:
    """(rows of the shard that have an edge, the group of each, its smallest distance in bits)."""
    with _load(store, f"{folder}/groups/{shard}.npz") as found:
        return found["row"], found["group"], found["distance"]


def hashes_of(texts: Sequence[str | None]) -> npt.NDArray[np.uint64]:
    """Sixteen hexadecimal digits each, first digit highest, as uint64."""
    return np.array([int(text, 16) for text in texts if text is not None], np.uint64)


def _plan(search: Near, rows: int) -> Tables:
    """Tables from the bits of a spread of shards; the same whenever it is asked."""
    step = max(1, len(search.names) // SAMPLED_SHARDS)
    sample = [search.candidates(name)[0] for name in search.names[::step]]
    return plan_tables(np.concatenate(sample) if sample else np.empty(0, np.uint64), search.radius, n=rows)


def _deal(search: Near, tables: Tables | None, parts: int, chunk: range) -> None:
    """Give each table's partitions the hashes of a chunk of shards."""
    held = []
    for number in chunk:
        hashes, rows = search.candidates(search.names[number])
        piece = np.empty(len(hashes), _HASHED)
        piece["hash"], piece["row"] = hashes, rows + search.starts[number]
        held.append(piece)
    hashed = np.concatenate(held)
    if tables is None:
        _save(search.store, search.place(f"hashes/0000/00000/{chunk.start:08d}.npy"), hashed)
    else:
        shift = np.uint64(64 - (parts.bit_length() - 1))
        for table in range(len(tables)):
            part_of = tables.permute(hashed["hash"], table) >> shift
            for part in range(parts):
                path = f"hashes/{table:04d}/{part:05d}/{chunk.start:08d}.npy"
                _save(search.store, search.place(path), hashed[part_of == part])
    search.store.put_json(search.place(f"dealt/{chunk.start}.json"), {"rows": len(hashed)})


def _find(search: Near, tables: Tables | None, task: tuple[int, int]) -> None:
    """Edges of one partition of one table, in pool row numbers."""
    table, part = task
    folder = search.place(f"hashes/{table:04d}/{part:05d}")
    files = [_load(search.store, f"{folder}/{name}") for name in search.store.names(folder)]
    hashed = np.concatenate([np.empty(0, _HASHED), *files])
    hashes = np.ascontiguousarray(hashed["hash"])
    pairs = edges_within(hashes, search.radius) if tables is None else edges_in_table(hashes, tables, table)
    distance = np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]).astype(np.uint8)
    _save(
        search.store, search.place(f"edges/{table:04d}-{part:05d}.npz"), pairs=hashed["row"][pairs], distance=distance
    )


def _merge(search: Near) -> None:
    """Groups of all edges: memory for the rows that have one."""
    names = search.store.names(search.place("edges"))

    def edges() -> Iterator[tuple[IntArray, npt.NDArray[np.uint8]]]:
        for name in names:
            with _load(search.store, search.place(f"edges/{name}")) as found:
                yield found["pairs"], found["distance"]

    rows, groups = stream_groups(pairs for pairs, _ in edges())
    nearest = np.full(len(rows), 255, np.uint8)
    for pairs, distance in edges():
        for side in (0, 1):
            np.minimum.at(nearest, np.searchsorted(rows, pairs[:, side]), distance)
    _save(search.store, search.place("near.npz"), row=rows, group=groups, distance=nearest)


def _spread(search: Near, rows: int, chunk: range) -> None:
    """Cut the groups into shards."""
    with _load(search.store, search.place("near.npz")) as found:
        row, group, distance = found["row"], found["group"], found["distance"]
    ends = [*search.starts[1:], rows]
    for number in chunk:
        first, last = np.searchsorted(row, [search.starts[number], ends[number]])
        mine = slice(first, last)
        path = search.place(f"groups/{search.names[number]}.npz")
        own = row[mine] - search.starts[number]
        _save(search.store, path, row=own, group=group[mine], distance=distance[mine])


def _missing(search: Near, folder: str, names: Sequence[str], items: Sequence[Any]) -> list[Any]:
    done = set(search.store.names(search.place(folder)))
    return [item for name, item in zip(names, items, strict=True) if name not in done]


def _all(results: Iterator[Any]) -> None:
    for _ in results:
        pass


def _save(store: Store, path: str, array: npt.NDArray[Any] | None = None, **arrays: npt.NDArray[Any]) -> None:
    out = io.BytesIO()
    if array is not None:
        np.save(out, array, allow_pickle=False)
    else:
        np.savez(out, allow_pickle=False, **arrays)
    store.put_bytes(path, out.getvalue())


def _load(store: Store, path: str) -> Any:
    return np.load(io.BytesIO(store.get_bytes(path)), allow_pickle=False)

"""Groups of near-equal values over all shards, as files in the store that the step turns into verdicts.

    <rule>/taking/<shard>.npz              rows of a shard that take part
    <rule>/dealt/<block>-<chunk>.bin       records of a chunk of shards, ordered by the partition that compares them
    <rule>/dealt/<chunk>.json              the chunk's records are all there; known groups that lost a row in it
    <rule>/edges/copies-<chunk>.npz        rows folded into equal ones before they were dealt
    <rule>/edges/<block>-<partition>.npz   pairs that are near, how similar they are, how many pairs were compared
    <rule>/near.npz                        every row that has an edge, its group, its greatest similarity
    <rule>/groups/<shard>.npz              the same, shard by shard

Rows are numbered across the pool in the order of its shards. What a record is, which partitions it goes to and which of
them are near, a `Search` says: hashes (`near_hashes`) or vectors (`near_vectors`). Rows that an earlier run compared
bring their group along (`known`), and only pairs with a row that is fresh are compared. Memory is bounded by a chunk,
by a partition, and at the end by the rows that have an edge. Files are a few for each chunk, and a task reads its own
range of each: their number grows with the pool, not with pool times partitions. Every file is written whole and none is
made twice: killed anywhere, a second run goes on. It refuses to decide who stays.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from curate.dedup.components import stream_groups
from curate.dedup.known import Known
from curate.schema import Shard
from curate.stage import Map
from curate.store import Store
from curate.vectors import chunks_of, finish, get_arrays, put_arrays

SHARDS_PER_SPREAD = 200  # near.npz is read once per this many shards

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
VectorArray = npt.NDArray[np.float16] | npt.NDArray[np.float32]
Records = npt.NDArray[Any]  # structured, with a field `row`
Edges = tuple[IntArray, FloatArray]  # int64[M, 2] rows of the pool, float32[M] similarity
FRESH = -1  # the group of a row that no earlier run compared
# (values [n, …], row numbers in the shard int64[n]) of the rows of a shard that take part.
Values = Callable[[str], tuple[npt.NDArray[Any], IntArray]]


class Search(Protocol):
    """How one kind of value is compared. Picklable.

    Attributes:
        record: dtype of what is dealt; besides `row` it has `known`: the row's group, or FRESH.
        blocks: how often all rows are dealt, each time into `parts` partitions.
        parts: partitions of a block.
        shards_per_chunk: what one task deals at once.
        grouped: whether near rows form groups; else an edge (i, j) says that i makes j redundant, at most once for j.
    """

    @property
    def record(self) -> np.dtype[Any]: ...
    @property
    def blocks(self) -> int: ...
    @property
    def parts(self) -> int: ...
    @property
    def shards_per_chunk(self) -> int: ...
    @property
    def grouped(self) -> bool: ...

    def deal(
        self, values: npt.NDArray[Any], rows: IntArray, known: IntArray
    ) -> tuple[Edges, Iterator[tuple[npt.NDArray[np.int32], Records]]]:
        """Edges known at once, and for each block (partition of each record, records)."""

    def find(self, block: int, part: int, pieces: Iterable[Records], lost: IntArray) -> tuple[Edges, int]:
        """Edges of one partition, from its records in the order of the pool, and how many pairs were compared.

        Rows of `lost` groups are fresh too.
        """


@dataclass(frozen=True)
class Pool:
    """One rule's rows: where its files are, and who takes part."""

    store: Store
    folder: str
    values: Values
    names: tuple[str, ...]
    starts: tuple[int, ...]  # number of each shard's first row
    rows: int
    everyone: Values  # the same, before other rules removed rows
    known: Known | None = None

    def place(self, path: str) -> str:
        """A path below the rule's folder."""
        return f"{self.folder}/{path}"


def pool_of(store: Store, folder: str, values: Values, everyone: Values, shards: Sequence[Shard]) -> Pool:
    """The rows of these shards, numbered in their order."""
    starts = np.cumsum([0, *(shard.rows for shard in shards)]).tolist()
    return Pool(store, folder, values, tuple(shard.name for shard in shards), tuple(starts[:-1]), starts[-1], everyone)


def group_near(pool: Pool, search: Search, map_items: Map) -> int:
    """Write `groups/<shard>.npz` for every shard; returns how many pairs were compared.

    What is there already is not made again.
    """
    chunks = chunks_of(len(pool.names), search.shards_per_chunk)
    dealt = set(pool.store.names(pool.place("dealt")))
    finish(map_items(partial(_deal, pool, search), [c for c in chunks if f"{c.start:08d}.json" not in dealt]))
    lost = _lost(pool, chunks)
    tasks = [(block, part) for block in range(search.blocks) for part in range(search.parts)]
    found = set(pool.store.names(pool.place("edges")))
    todo = [task for task in tasks if f"{task[0]:04d}-{task[1]:05d}.npz" not in found]
    finish(map_items(partial(_find, pool, search, [chunk.start for chunk in chunks], lost), todo))
    if not pool.store.exists(pool.place("near.npz")):
        _merge(pool, search.grouped, lost)
    grouped = set(pool.store.names(pool.place("groups")))
    spans = chunks_of(len(pool.names), SHARDS_PER_SPREAD)
    left = [span for span in spans if any(f"{pool.names[number]}.npz" not in grouped for number in span)]
    finish(map_items(partial(_spread, pool), left))
    return int(get_arrays(pool.store, pool.place("near.npz"))["compared"][0])


def read_groups(store: Store, folder: str, shard: str) -> Mapping[str, npt.NDArray[Any]]:
    """Of a shard: `row` int64 with an edge, `group` int64 and `similarity` float32 of each, `named` int64: its rows
    after which a group is named, `start` int64[1]: the number of its first row in the pool."""
    return get_arrays(store, f"{folder}/groups/{shard}.npz")


def _deal(pool: Pool, search: Search, chunk: range) -> None:
    """Give each partition of each block the records of a chunk of shards."""
    read = [pool.values(pool.names[number]) for number in chunk]
    values = np.concatenate([values for values, _ in read])
    known, lost = zip(*(_known(pool, number, rows) for number, (_, rows) in zip(chunk, read, strict=True)), strict=True)
    rows = np.concatenate([rows + pool.starts[number] for number, (_, rows) in zip(chunk, read, strict=True)])
    del read
    (pairs, similarity), blocks = search.deal(values, rows, np.concatenate(known))
    if len(pairs):
        put_arrays(pool.store, pool.place(f"edges/copies-{chunk.start:08d}.npz"), pairs=pairs, similarity=similarity)
    for block, (parts, records) in enumerate(blocks):
        starts = np.zeros(search.parts + 1, np.int64)
        starts[1:] = np.cumsum(np.bincount(parts, minlength=search.parts))
        order = np.argsort(parts, kind="stable")
        with pool.store.staged(pool.place(f"dealt/{block:04d}-{chunk.start:08d}.bin")) as local, local.open("wb") as f:
            f.write(starts.tobytes())
            for at in range(0, len(order), 1 << 14):
                f.write(records[order[at : at + (1 << 14)]].tobytes())
    told = {"rows": len(rows), "lost": np.unique(np.concatenate(lost)).tolist()}
    pool.store.put_json(pool.place(f"dealt/{chunk.start:08d}.json"), told)


def _known(pool: Pool, number: int, rows: IntArray) -> tuple[IntArray, IntArray]:
    """(group of each of these rows of a shard, or FRESH; groups of known rows that take part no longer)."""
    put_arrays(pool.store, pool.place(f"taking/{pool.names[number]}.npz"), row=rows.astype(np.int32))
    group = np.full(len(rows), FRESH, np.int64)
    if pool.known is None:
        return group, np.empty(0, np.int64)
    compared, groups, _ = pool.known.of(pool.names[number])
    _, here, there = np.intersect1d(rows, compared, assume_unique=True, return_indices=True)
    group[here] = groups[there]
    return group, np.delete(groups, there)


def _lost(pool: Pool, chunks: Sequence[range]) -> IntArray:
    """Known groups that are not what they were: their rows are compared again."""
    if pool.known is None:
        return np.empty(0, np.int64)
    told = [pool.store.get_json(pool.place(f"dealt/{chunk.start:08d}.json"))["lost"] for chunk in chunks]
    return np.unique(np.concatenate([pool.known.gone(), *(np.array(one, np.int64) for one in told)]))


def _pieces(pool: Pool, search: Search, chunks: Sequence[int], block: int, part: int) -> Iterator[Records]:
    """The records of a partition, chunk after chunk."""
    head, size = 8 * (search.parts + 1), search.record.itemsize
    for chunk in chunks:
        path = pool.place(f"dealt/{block:04d}-{chunk:08d}.bin")
        (bounds,) = pool.store.read_ranges(path, [8 * part], [16])
        start, stop = np.frombuffer(bounds, np.int64).tolist()
        if stop > start:
            (data,) = pool.store.read_ranges(path, [head + start * size], [(stop - start) * size])
            yield np.frombuffer(data, search.record)


def _find(pool: Pool, search: Search, chunks: Sequence[int], lost: IntArray, task: tuple[int, int]) -> None:
    block, part = task
    pieces = _pieces(pool, search, chunks, block, part)
    (pairs, similarity), compared = search.find(block, part, pieces, lost)
    put_arrays(
        pool.store, pool.place(f"edges/{block:04d}-{part:05d}.npz"), pairs=pairs, similarity=similarity,
        compared=np.array([compared], np.int64),
    )  # fmt: skip


def _merge(pool: Pool, grouped: bool, lost: IntArray) -> None:
    """Groups of all edges, old and new: memory for the rows that have one."""
    names = pool.store.names(pool.place("edges"))

    def edges() -> Iterator[Edges]:
        for name in names:
            found = get_arrays(pool.store, pool.place(f"edges/{name}"))
            yield found["pairs"], found["similarity"]

    compared = sum(int(get_arrays(pool.store, pool.place(f"edges/{name}")).get("compared", [0])[0]) for name in names)
    if not grouped:
        parts = list(edges())
        pairs = np.concatenate([np.empty((0, 2), np.int64), *[pairs for pairs, _ in parts]])
        similarity = np.concatenate([np.empty(0, np.float32), *[similarity for _, similarity in parts]])
        order = np.argsort(pairs[:, 1], kind="stable")
        _save_near(pool, pairs[order, 1], pairs[order, 0], similarity[order], compared)
        return
    rows, groups = stream_groups(
        chain((pairs for pairs, _ in edges()), (pairs for pairs, _ in _known_edges(pool, lost)))
    )
    nearest = np.full(len(rows), -1, np.float32)
    for pairs, similarity in edges():
        for side in (0, 1):
            np.maximum.at(nearest, np.searchsorted(rows, pairs[:, side]), similarity)
    for pairs, similarity in _known_edges(pool, lost):  # to the lowest row of the group: no edge of that row's own
        np.maximum.at(nearest, np.searchsorted(rows, pairs[:, 1]), similarity)
    _save_near(pool, np.asarray(rows, np.int64), np.asarray(groups, np.int64), nearest, compared)


def _known_edges(pool: Pool, lost: IntArray) -> Iterator[Edges]:
    """What an earlier run knows, of groups that are what they were: (lowest row, row), and the row's similarity."""
    for name, start in zip(pool.names, pool.starts, strict=True) if pool.known is not None else ():
        rows, groups, similarity = pool.known.of(name)  # type: ignore[union-attr]
        held = (similarity >= 0) & ~np.isin(groups, lost)
        yield np.stack([groups[held], rows[held] + start], axis=1), similarity[held]


def _save_near(pool: Pool, row: IntArray, group: IntArray, similarity: FloatArray, compared: int) -> None:
    put_arrays(
        pool.store, pool.place("near.npz"), row=row, group=group, similarity=similarity, named=np.unique(group),
        compared=np.array([compared], np.int64),
    )  # fmt: skip


def _spread(pool: Pool, chunk: range) -> None:
    """Cut the groups into shards."""
    near = get_arrays(pool.store, pool.place("near.npz"))
    ends = [*pool.starts[1:], pool.rows]
    for number in chunk:
        start, end = pool.starts[number], ends[number]
        mine = slice(*np.searchsorted(near["row"], [start, end]))
        named = slice(*np.searchsorted(near["named"], [start, end]))
        put_arrays(
            pool.store, pool.place(f"groups/{pool.names[number]}.npz"), row=near["row"][mine] - start,
            group=near["group"][mine], similarity=near["similarity"][mine], named=near["named"][named] - start,
            start=np.array([start], np.int64),
        )  # fmt: skip

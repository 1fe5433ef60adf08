"""Vectors of all shards: which rows take part, numbered across the pool, and a sample that no worker count can change.

A row takes part when it has an image (status ok, where there is such a column), a vector, and satisfies the recipe's
condition. Random draws are "the rows with the smallest hash of (seed, key)", so that any worker can draw its part. It
refuses columns that are not vectors of one width; a vector of zeros or NaN is given as it is.
"""

import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.errors import PlanError, StoreError
from curate.rows import Column, columns_of, evaluate, names_in, read_rows, schema_of
from curate.schema import KEY, OK, Shard, TableSpec
from curate.stage import Map
from curate.store import Store

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

SHARDS_PER_CHUNK = 50  # 1 GB of float16 vectors of 1024 numbers
SPARE = 6  # standard deviations by which a draw exceeds the sample, so that it is not too small
POINT_BYTES = 8  # of each number of a sample: as drawn (float16, centroids float32) and as k-means sees it, float32
CENTRE_BYTES = 12  # of each number of a centroid: float32, and the sums that it is the mean of


class Points(Protocol):
    """Vectors in numbered pieces: the rows of a pool by shard, or the centroids of a level of clusters."""

    @property
    def store(self) -> Store:
        """Where they lie, and where passes over them keep their files."""

    @property
    def width(self) -> int:
        """Numbers in a vector."""

    @property
    def starts(self) -> Sequence[int]:
        """Number of each piece's first row, and of the row behind the last."""

    def count(self, piece: int) -> int:
        """Rows of a piece that take part, before their vectors are looked at."""

    def read(self, piece: int) -> "Vectors":
        """Those that have a vector, in row order."""


@dataclass(frozen=True)
class Pool:
    """The rows of a pool that have a vector `by` and satisfy `where`. Row numbers run through the shards in order."""

    store: Store
    columns: Mapping[str, Column]
    by: str
    where: str | None
    names: tuple[str, ...]
    starts: tuple[int, ...]  # number of each shard's first row, and of the row behind the last

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return int(self.columns[self.by].type.list_size)

    @property
    def tables(self) -> list[TableSpec]:
        """What is read to know who takes part, and the vectors."""
        names = [self.by, *self._asked()]
        return list({self.columns[name].table.name: self.columns[name].table for name in names}.values())

    def _asked(self) -> list[str]:
        status = ["status"] if "status" in self.columns else []
        return status + (names_in(self.where, schema_of(self.columns)) if self.where else [])

    def taking_part(self, number: int) -> tuple[pa.Table, npt.NDArray[np.bool_]]:
        """(key, whatever was asked; bool[n]) of a shard, before its vectors are looked at."""
        table = read_rows(self.store, self.columns, self._asked(), self.names[number])
        mask = np.ones(table.num_rows, bool)
        if "status" in table.column_names:
            mask &= np.asarray(pc.equal(table["status"], OK).fill_null(False))
        if self.where:
            held = evaluate(table, {"held": f"CAST(({self.where}) AS BOOLEAN)"})["held"]
            mask &= np.asarray(held.fill_null(False))
        return table, mask

    def count(self, piece: int) -> int:
        """Rows of a shard that take part."""
        return int(self.taking_part(piece)[1].sum())

    def read(self, piece: int) -> "Vectors":
        """The vectors of a shard, in row order."""
        table, mask = self.taking_part(piece)
        vectors, valid = matrix(read_rows(self.store, self.columns, [self.by], self.names[piece])[self.by])
        rows = np.flatnonzero(mask & valid)
        keys = key_numbers(table[KEY.name].to_pylist())
        return Vectors(rows + self.starts[piece], keys[rows], vectors[np.flatnonzero(mask[valid])])


@dataclass(frozen=True, eq=False)
class Vectors:
    """Row numbers int64[n] in the pool, the first 64 bits of their keys uint64[n], vectors [n, d]."""

    rows: Int64
    keys: UInt64
    vectors: npt.NDArray[Any]


def pool_of(
    store: Store, tables: Sequence[TableSpec], shards: Sequence[Shard], by: str, where: str | None, place: str
) -> Pool:
    """The pool of these shards. `place` starts errors. Raises PlanError for a column that is no vector, or bad SQL."""
    columns = columns_of(tables)
    held = columns.get(by)
    vectors = [name for name, column in columns.items() if pa.types.is_fixed_size_list(column.type)]
    if held is None or by not in vectors:
        raise PlanError(f"{place}.by: {by} is no column of vectors; there are: {', '.join(vectors) or 'none'}")
    starts = tuple(accumulate((shard.rows for shard in shards), initial=0))
    pool = Pool(store, columns, by, where, tuple(shard.name for shard in shards), starts)
    try:
        _ = pool.tables
    except PlanError as error:
        raise PlanError(f"{place}.where: {error}") from None
    return pool


def founders(shards: Sequence[Shard]) -> Sequence[Shard]:
    """The first shards, up to the largest power of two of rows that the pool has: what is trained on them outlives a
    refresh, and over all refreshes a pool is trained anew as often as it doubles."""
    ends = np.cumsum([0, *(shard.rows for shard in shards)])
    return shards[: int(np.searchsorted(ends, 1 << max(0, int(ends[-1]).bit_length() - 1)))]


def matrix(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """(the vectors that are there [m, d], which rows have one bool[n]) of a column of fixed-size lists."""
    width = column.type.list_size
    there = column.drop_null()
    parts = [np.asarray(chunk.flatten()).reshape(-1, width) for chunk in there.chunks if len(chunk)]
    empty = np.empty((0, width), column.type.value_type.to_pandas_dtype())
    return np.concatenate([empty, *parts]), np.asarray(column.is_valid())


def key_numbers(keys: Sequence[str]) -> UInt64:
    """The first 64 bits of each key (32 hex digits, curate.schema.key_of) as uint64[n]."""
    return np.frombuffer(bytes.fromhex("".join(key[:16] for key in keys)), dtype=">u8").astype(np.uint64)


def hashed(numbers: npt.NDArray[Any], seed: int, salt: int = 0) -> UInt64:
    """A well-mixed uint64 for each integer, seed and salt (the finaliser of SplitMix64, Steele et al. 2014).

    `numbers` is any integer array, for draws usually the keys of rows; equal inputs give equal hashes on every machine,
    and different numbers different ones.
    """
    start = (seed * 0x9E3779B97F4A7C15 + salt * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) % (1 << 64)
    mixed = numbers.astype(np.uint64) + np.uint64(start)  # wraps, as it should
    for _ in range(2):  # twice: keys of a test are often 0, 1, 2, …
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def draw(points: Points, work: str, size: int, seed: int, map_items: Map) -> None:
    """Draw about `size` rows that take part, by hash of (seed, key); `drawn` gives the sample, on any worker.

    Files below `work` are written whole and none is made twice. Memory: a chunk's part of the sample.
    """
    store, chunks = points.store, pieces_of(points)
    if not store.exists(f"{work}/taking_part.json"):
        rows = sum(map_items(partial(_count, points), chunks))
        store.put_json(f"{work}/taking_part.json", {"rows": rows})
    rows = store.get_json(f"{work}/taking_part.json")["rows"]
    share = (size + SPARE * size**0.5) / max(rows, 1)
    bound = min(int(share * 2**64), 2**64 - 1)
    done = set(store.names(f"{work}/sample"))
    todo = [chunk for chunk in chunks if f"{chunk.start:08d}.npz" not in done]
    finish(map_items(partial(_draw, points, work, seed, bound), todo))


def drawn(points: Points, work: str, size: int) -> tuple[Int64, npt.NDArray[Any]]:
    """(rows int64[m], vectors [m, d]) of the sample, m at most `size`, in the order of the hashes.

    Memory: the sample and a chunk's part of it.
    """
    paths = [f"{work}/sample/{name}" for name in points.store.names(f"{work}/sample")]
    marks = [get_arrays(points.store, path, "marks")["marks"] for path in paths]
    first = np.argsort(np.concatenate([np.empty(0, np.uint64), *marks]), kind="stable")[:size]
    place = np.full(sum(map(len, marks)), -1, np.int64)
    place[first] = np.arange(len(first))
    rows, vectors, before = np.empty(len(first), np.int64), np.empty((0, points.width), np.float16), 0
    for path, part in zip(paths, marks, strict=True):
        held, to = get_arrays(points.store, path), place[before : before + len(part)]
        if not before:
            vectors = np.empty((len(first), points.width), held["vectors"].dtype)
        before += len(part)
        rows[to[to >= 0]] = held["rows"][to >= 0]
        vectors[to[to >= 0]] = held["vectors"][to >= 0]
    return rows, vectors


def points_within(count: int, wanted: int, width: int, memory_gb: float, place: str) -> int:
    """Points for each of `count` cells, at most `wanted`, on which one task can train k-means in so much memory.

    Raises PlanError where not even one fits; `place` starts its text.
    """
    left = memory_gb * 1e9 - count * width * CENTRE_BYTES
    most = int(left // (count * width * POINT_BYTES))
    if most < 1:
        needed = count * width * (CENTRE_BYTES + POINT_BYTES) / 1e9
        raise PlanError(f"{place}: {count:,} clusters of {width} numbers need {needed:,.1f} GB in one task; "
                        f"raise memory_gb ({memory_gb:g}), or take fewer")  # fmt: skip
    return min(wanted, most)


def _count(points: Points, chunk: range) -> int:
    return sum(points.count(piece) for piece in chunk)


def _draw(points: Points, work: str, seed: int, bound: int, chunk: range) -> None:
    held: dict[str, list[npt.NDArray[Any]]] = {"marks": [], "rows": [], "vectors": []}
    for piece in chunk:
        part = points.read(piece)
        marks = hashed(part.keys, seed)
        first = marks <= np.uint64(bound)
        for name, values in (("marks", marks), ("rows", part.rows), ("vectors", part.vectors)):
            held[name].append(values[first])
    path = f"{work}/sample/{chunk.start:08d}.npz"
    put_arrays(points.store, path, **{name: np.concatenate(values) for name, values in held.items()})


def pieces_of(points: Points) -> list[range]:
    """Runs of pieces: the items of a pass over points."""
    return chunks_of(len(points.starts) - 1)


def chunks_of(count: int, most: int | None = None) -> list[range]:
    """Runs of `most` numbers out of 0 … count - 1: the items of a pass over shards."""
    size = most or SHARDS_PER_CHUNK
    return [range(at, min(at + size, count)) for at in range(0, count, size)]


def finish(results: Iterator[Any]) -> None:
    """Let a map run to its end."""
    for _ in results:
        pass


def put_arrays(store: Store, path: str, **arrays: npt.NDArray[Any]) -> None:
    """Named arrays as one .npz, whole or not at all."""
    out = io.BytesIO()
    np.savez(out, allow_pickle=False, **arrays)
    store.put_bytes(path, out.getvalue())


def get_arrays(store: Store, path: str, *names: str) -> Mapping[str, npt.NDArray[Any]]:
    """What `put_arrays` wrote; only these arrays where some are named. Raises StoreError where that is damaged."""
    data = store.get_bytes(path)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as held:
            return {name: held[name] for name in names or held.files}
    except (ValueError, TypeError, AttributeError, EOFError, KeyError, BadZipFile, zlib.error) as error:
        top = path.partition("/")[0]
        act = "restore it" if top != "_near" else f"remove the folder {store.url(top)}, and all is compared again"
        raise StoreError(f"{store.url(path)} is damaged ({type(error).__name__}: {error}); {act}") from None


def unless_there(store: Store, path: str, make: Callable[[], Mapping[str, npt.NDArray[Any]]]) -> Mapping[str, Any]:
    """The arrays at `path`, made and kept there if they are not."""
    if not store.exists(path):
        put_arrays(store, path, **make())
    return get_arrays(store, path)

"""Vectors near in cosine as a search over partitions (`near`): k-means cells, each vector in its nearest few.

Cells are trained on a seeded sample of the pool's founders: its first shards, up to the largest power of two of rows.
So they stay the same, and old pairs known, while a pool grows to twice its size, and then all is compared anew: over
all refreshes each row is compared with all a few times. SemDeDup is compared whole on each refresh: its paper clusters
all of the pool, so new rows move the cells, and with them who is ranked against whom.

A partition is a run of cells; a row enters it once, with its vector, however many of its cells lie there. Inside a cell
the search is exact (`cosine`), and pairs that share no cell are missed: `measure_pool` says how many. A pool of up to
40,000 rows is one cell, exact. With `cells: pool` the cells are those that retrieval searches; comparing takes longer
in proportion to the rows of a cell, and retrieval's 10,000 are 60,000 with visitors, where a rule's own are 8,000.

Rows of equal bytes are folded into the first of them before they are dealt and again while a partition is read, so a
placeholder image that is half of the pool is held once. Three forms (RECIPES 2 and 5), each the published algorithm
where one cell (SemDeDup: the cell) holds what is compared:

    threshold   edges at or above a cosine, components
    dinov2      edges from each row to its nearest k above a cosine, components; over several cells a row's nearest k of
                each partition, so that a crowded row may have more edges than k, all of them above the cosine
    semdedup    one cell for each row, the farthest from the centre first; no components
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from curate.dedup.cells import (
    ONE_CELL,
    PROBES,
    ROWS_PER_CELL,
    SAMPLE_PER_CELL,
    CellArray,
    assign_cells,
    keep_nearest,
    rows_of_cells,
    train_cells,
)
from curate.dedup.components import spanning_forest
from curate.dedup.cosine import edges_above, first_equal, nearest_above
from curate.dedup.cosine_block import VectorArray
from curate.dedup.known import Known
from curate.dedup.near import FRESH, Edges, IntArray, Pool, Records
from curate.dedup.semdedup import rank_rows, similarity_to_earlier
from curate.schema import Shard
from curate.store import Store
from curate.vectors import founders, get_arrays, put_arrays

BoolArray = npt.NDArray[np.bool_]
Form = Literal["threshold", "dinov2", "semdedup"]

PARTITION_BYTES = 1 << 29  # of records in one task; comparing a cell of them takes about as much again
CHUNK_BYTES = 1 << 28  # of vectors dealt by one task
PARTS = 32  # at least, where there are as many cells: work for that many cores
SAMPLE_BYTES = 1 << 31  # of training vectors as float32: 1 million of 512; beyond 26,000 cells hold more rows instead
LEAST_PER_CELL = 39  # training rows, below which faiss warns
PUBLISHED_ROWS_PER_CELL = 8_800  # SemDeDup: 440 M rows in 50,000 cells
SAMPLED_SHARDS = 64
RECALL_ROWS = 1_024
EDGES_HELD = 4_000_000  # of dinov2, before they are cut to the nearest


@dataclass(frozen=True)
class VectorSearch:
    """See the module's docstring. `threshold` is inclusive for the form threshold, else exclusive."""

    store: Store
    cells_path: str
    form: Form
    threshold: float
    neighbours: int
    width: int
    dtype: str
    probes: int
    parts: int
    shards_per_chunk: int
    blocks: int = 1
    known: Known | None = None  # dinov2: what an earlier run found nearest
    found: str = ""  # dinov2: the folder of what is found nearest

    @property
    def record(self) -> np.dtype[Any]:
        """A row, the group that it is known to be in, the cells that it entered, its vector."""
        return np.dtype([
            ("row", np.int64), ("known", np.int64), ("cells", np.int32, (self.probes,)),
            ("vector", self.dtype, (self.width,)),
        ])  # fmt: skip

    @property
    def grouped(self) -> bool:
        """Whether components are the answer."""
        return self.form != "semdedup"

    @property
    def copies_kept(self) -> int:
        """Rows of equal bytes that the answer can depend on; the rest hang on the first."""
        if self.form == "dinov2":
            return self.neighbours + 1
        return 1 if self.form == "threshold" or self.threshold < 1 else np.iinfo(np.int64).max

    @cached_property
    def cells(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """(centres float32[K, d], partition of each cell int32[K])."""
        found = get_arrays(self.store, self.cells_path)
        return found["centres"], found["part"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "cells"}  # each worker reads them

    def deal(
        self, values: VectorArray, rows: IntArray, known: IntArray
    ) -> tuple[Edges, Iterator[tuple[npt.NDArray[np.int32], Records]]]:
        """Every usable vector into the partitions of its cells."""
        centres, part_of = self.cells
        kept, edges = fold_equal(values, rows, self.copies_kept)
        cells, _ = assign_cells(values[kept], centres, self.probes)
        usable = cells[:, 0] >= 0
        alive = np.isin(edges[0][:, 0], rows[kept][usable]) if len(edges[0]) else np.empty(0, np.bool_)
        kept, cells = kept[usable], cells[usable]
        parts = part_of[cells]
        parts.sort(axis=1)
        new = np.ones(parts.shape, np.bool_)
        new[:, 1:] = parts[:, 1:] != parts[:, :-1]
        which, column = np.nonzero(new)
        dealt = _Dealt(self.record, rows[kept], known[kept], cells, values, kept, which)
        return (edges[0][alive], edges[1][alive]), iter([(parts[which, column], dealt)])  # type: ignore[list-item]

    def find(self, block: int, part: int, pieces: Iterable[Records], lost: IntArray) -> tuple[Edges, int]:
        """Edges inside the cells of one partition."""
        records, copies = self._load(pieces)
        fresh = (records["known"] == FRESH) | np.isin(records["known"], lost)
        found: list[Edges] = []
        if self.form == "dinov2":
            fresh, *found = self._neighbours(part, records["row"])
        held = compared = 0
        for cell, mine in self._cells_with(part, records, fresh):
            pairs, similarity = self._in_cell(np.ascontiguousarray(records["vector"][mine]), cell, fresh[mine])
            compared += pairs_with_fresh(fresh[mine])
            found.append((records["row"][mine][pairs], similarity))
            held += len(pairs)
            if self.form == "dinov2" and held > EDGES_HELD:
                found = [keep_nearest(found, self.neighbours)]
                held = max(0, len(found[0][0]) - EDGES_HELD // 2)
        if self.form == "dinov2":
            pairs, similarity = keep_nearest(found, self.neighbours)
            path = f"{self.found}/{part:05d}.npz"
            put_arrays(self.store, path, row=records["row"], pairs=pairs, similarity=similarity)
            found = [(pairs, similarity)]
        found.append(copies)
        pairs = np.concatenate([pairs for pairs, _ in found])
        similarity = np.concatenate([similarity for _, similarity in found])
        if self.grouped:
            ends = np.sort(pairs, axis=1)
            forest = spanning_forest(ends, -similarity)
            pairs, similarity = ends[forest], similarity[forest]
        return (pairs, similarity), compared

    def _cells_with(self, part: int, records: Records, fresh: BoolArray) -> Iterator[tuple[int, IntArray]]:
        """Cells of a partition that hold a fresh row, and the records in each."""
        _, part_of = self.cells
        for cell, mine in rows_of_cells(np.ascontiguousarray(records["cells"])):
            if part_of[cell] == part and fresh[mine].any():
                yield cell, mine

    def _neighbours(self, part: int, rows: IntArray) -> tuple[BoolArray, Edges]:
        """(rows to compare with all, new ones and those that lost a neighbour; known pairs of rows that are there)."""
        if self.known is None:
            return np.ones(len(rows), np.bool_), (np.empty((0, 2), np.int64), np.empty(0, np.float32))
        compared, pairs, similarity = self.known.nearest(part)
        here = np.isin(pairs, rows)
        both, bereft = here.all(axis=1), pairs[here & ~here.all(axis=1, keepdims=True)]
        return ~np.isin(rows, compared) | np.isin(rows, bereft), (pairs[both], similarity[both])

    def _in_cell(self, vectors: VectorArray, cell: int, fresh: BoolArray) -> Edges:
        if self.form == "threshold":
            return edges_above(vectors, self.threshold, fresh=fresh)
        if self.form == "dinov2":
            return nearest_above(vectors, self.threshold, self.neighbours, fresh=fresh)
        wide = vectors.astype(np.float64)  # row by row, so that the ranking does not depend on the block
        nearness = (wide * self.cells[0][cell]).sum(axis=1) / np.sqrt((wide * wide).sum(axis=1))
        redundant, similarity, earlier = similarity_to_earlier(
            vectors, rank_rows(nearness.astype(np.float32)), 1 - self.threshold
        )
        gone = np.flatnonzero(redundant)
        return np.stack([earlier[gone], gone], axis=1), similarity[gone]

    def _load(self, pieces: Iterable[Records]) -> tuple[Records, Edges]:
        """A partition's records, equal vectors folded as they come, so that memory is bounded by different ones."""
        held: list[Records] = [np.empty(0, self.record)]
        edges: list[Edges] = []
        rows, limit = 0, 1 << 16
        for piece in pieces:
            held.append(piece)
            rows += len(piece)
            if rows > limit:
                held = [self._fold(held, edges)]
                rows = len(held[0])
                limit = max(1 << 16, 2 * rows)
        records = self._fold(held, edges)
        return records, (
            np.concatenate([np.empty((0, 2), np.int64), *[pairs for pairs, _ in edges]]),
            np.concatenate([np.empty(0, np.float32), *[similarity for _, similarity in edges]]),
        )

    def _fold(self, held: list[Records], edges: list[Edges]) -> Records:
        records = np.concatenate(held)
        kept, found = fold_equal(np.ascontiguousarray(records["vector"]), records["row"], self.copies_kept)
        edges.append(found)
        return records if len(kept) == len(records) else records[kept]


class _Dealt:
    """Records made as they are asked for: a chunk's records are several times its vectors."""

    def __init__(
        self, record: np.dtype[Any], rows: IntArray, known: IntArray, cells: CellArray, values: VectorArray,
        kept: IntArray, which: IntArray,
    ) -> None:  # fmt: skip
        self.record, self.rows, self.known, self.cells, self.values, self.kept = (
            record,
            rows,
            known,
            cells,
            values,
            kept,
        )
        self.which = which

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, at: IntArray) -> Records:
        which = self.which[at]
        records = np.empty(len(which), self.record)
        records["row"], records["known"], records["cells"] = self.rows[which], self.known[which], self.cells[which]
        records["vector"] = self.values[self.kept[which]]
        return records


def fold_equal(vectors: VectorArray, rows: IntArray, most: int) -> tuple[IntArray, Edges]:
    """Keep the first `most` of rows with equal bytes: (positions kept, edges from the first row to the others)."""
    first = first_equal(vectors)
    order = np.argsort(first, kind="stable")
    new = np.flatnonzero(np.r_[True, first[order][1:] != first[order][:-1]][: len(order)])
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - np.repeat(new, np.diff(np.r_[new, len(order)]))
    copies = np.flatnonzero(place >= most)
    pairs = np.stack([rows[first[copies]], rows[copies]], axis=1)
    return np.flatnonzero(place < most), (pairs, np.ones(len(copies), np.float32))


def pairs_with_fresh(fresh: BoolArray) -> int:
    """Pairs of rows, one of them fresh at least."""
    new = int(fresh.sum())
    return new * (new - 1) // 2 + new * (len(fresh) - new)


def founding_shards(shards: Sequence[Shard]) -> Sequence[Shard]:
    """The founders, on which cells are trained; none, where one cell holds the pool."""
    return founders(shards) if sum(shard.rows for shard in shards) > ONE_CELL * ROWS_PER_CELL else []


def search_vectors(
    pool: Pool, founding: Pool, form: Form, threshold: float, neighbours: int, cells: int | str | None, width: int,
    dtype: str,
) -> VectorSearch:  # fmt: skip
    """The search for this pool. Writes its cells and the sample that recall is measured on, unless they are there.

    `cells`: how many (SemDeDup), the file of the pool's own, or None: as many as comparing is cheapest in.
    """
    path = pool.place("cells.npz")
    size = np.dtype(dtype).itemsize * width
    if not pool.store.exists(pool.place("sample.npz")):
        put_arrays(pool.store, pool.place("sample.npz"), **_recall_sample(pool, width, dtype))
    if not pool.store.exists(path):
        centres, drawn = _train(founding, pool.rows, form, cells, width, dtype)
        probes = 1 if form == "semdedup" else min(PROBES, len(centres))
        rows = pool.rows if form == "semdedup" else 2 * founding.rows  # as many as there will be in these cells
        bytes_dealt = rows * min(probes, len(centres)) * (size + 16 + 4 * probes)
        parts = min(len(centres), max(PARTS, -(-bytes_dealt // PARTITION_BYTES)))
        put_arrays(pool.store, path, centres=centres, part=_even_parts(drawn, centres, probes, parts))
    part = get_arrays(pool.store, path)["part"]
    count, parts = len(part), int(part.max()) + 1
    probes = 1 if form == "semdedup" else min(PROBES, count)
    rows_per_shard = max(1, pool.rows // max(1, len(pool.names)))
    shards_per_chunk = max(1, CHUNK_BYTES // (size * rows_per_shard))
    return VectorSearch(
        pool.store, path, form, threshold, neighbours, width, dtype, probes, parts, shards_per_chunk
    )  # fmt: skip


def _usable(vectors: VectorArray, width: int) -> BoolArray:
    return np.asarray(assign_cells(vectors, np.ones((1, width), np.float32), 1)[0][:, 0] >= 0)


def _recall_sample(pool: Pool, width: int, dtype: str) -> dict[str, npt.NDArray[Any]]:
    """Rows whose true pairs are counted, and their vectors; one of those with equal bytes."""
    vectors, rows, _ = _draw(pool, RECALL_ROWS, width, dtype)
    usable = _usable(vectors, width)
    vectors, rows = vectors[usable], rows[usable]
    chosen = np.random.default_rng(1).permutation(len(rows))[:RECALL_ROWS]
    chosen = chosen[first_equal(vectors[chosen]) == np.arange(len(chosen))]
    return {"row": rows[chosen], "vector": vectors[chosen]}


def _train(
    founding: Pool, rows: int, form: Form, cells: int | str | None, width: int, dtype: str
) -> tuple[npt.NDArray[np.float32], VectorArray]:
    """Cells for a pool of so many rows, and the different vectors of its founders that they were trained on."""
    probes = 1 if form == "semdedup" else PROBES
    rows_per_cell = PUBLISHED_ROWS_PER_CELL if form == "semdedup" else ROWS_PER_CELL
    expected = rows if form == "semdedup" else founding.rows * 3 // 2  # between two doublings
    if isinstance(cells, str):
        given = get_arrays(founding.store, cells)["centroids"]
        return given, _draw(founding, min(len(given) * SAMPLE_PER_CELL, SAMPLE_BYTES // (4 * width)), width, dtype)[0]
    count = cells or max(1, round(expected * probes / rows_per_cell))
    wanted = max(RECALL_ROWS, min(count * SAMPLE_PER_CELL, SAMPLE_BYTES // (4 * width)))
    vectors, _, share = _draw(founding, wanted, width, dtype)
    vectors = vectors[_usable(vectors, width)]
    even = np.full((1, width), width**-0.5, np.float32)
    different = vectors[first_equal(vectors) == np.arange(len(vectors))]
    n = round(expected * share * (len(different) / max(1, len(vectors))))
    if not len(different):
        return even, different
    if form == "semdedup":
        return train_cells(different, n, cells=cells or max(1, round(n / rows_per_cell)), iterations=100), different
    per_cell = max(ROWS_PER_CELL, -(-n * PROBES * LEAST_PER_CELL // len(different)))
    return train_cells(different, n, rows_per_cell=per_cell), different


def _draw(pool: Pool, wanted: int, width: int, dtype: str) -> tuple[VectorArray, IntArray, float]:
    """About `wanted` vectors of a spread of shards, their rows, and which share of rows takes part."""
    per_shard = max(1, pool.rows // max(1, len(pool.names)))
    count = min(len(pool.names), max(SAMPLED_SHARDS, -(-2 * wanted // per_shard)))
    vectors: list[Any] = [np.empty((0, width), dtype)]
    rows: list[IntArray] = [np.empty(0, np.int64)]
    ends = [*pool.starts[1:], pool.rows]
    taking = seen = 0
    for number in sorted({at * len(pool.names) // max(1, count) for at in range(count)}):
        found, own = pool.values(pool.names[number])
        taking, seen = taking + len(own), seen + ends[number] - pool.starts[number]
        quota = -(-wanted // count)
        chosen = np.sort(np.random.default_rng([0, number]).permutation(len(own))[:quota])
        vectors.append(found[chosen])
        rows.append(own[chosen] + pool.starts[number])
    drawn: VectorArray = np.concatenate(vectors)
    return drawn, np.concatenate(rows), taking / max(1, seen)


def _even_parts(
    sample: VectorArray, centres: npt.NDArray[np.float32], probes: int, parts: int
) -> npt.NDArray[np.int32]:
    """A partition for each cell: runs of cells that the sample fills about evenly."""
    cells, _ = assign_cells(sample, centres, probes) if len(sample) else (np.empty((0, 1), np.int32), None)
    filled = np.bincount(cells[cells >= 0], minlength=len(centres)) + 1e-3
    middle = (np.cumsum(filled) - filled / 2) / filled.sum()
    part = np.minimum((middle * parts).astype(np.int32), parts - 1)
    return np.asarray(np.unique(part, return_inverse=True)[1].reshape(-1), np.int32)  # none is empty

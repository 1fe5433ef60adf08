"""Sample-based retrieval: the k nearest pool vectors of every seed, as LVD-142M did for its large seed sets.

Queries are grouped by the cells they probe and each cell is one matrix product, so the pool streams past once, cell by
cell, in float16 or from codes; what the products cannot tell apart is scored again in float64. The lists of different
seeds may overlap, as published (RECIPES section 2); counting a pool image once or several times is the caller's choice.
The result depends on neither blocks, workers nor device. It refuses nothing but wrong shapes: a seed without a usable
vector finds nothing, and k beyond the pool leaves row -1.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

from curate.errors import PlanError
from curate.retrieve.cells import ROUNDING, Float64, dots, norms, unit, usable, widened
from curate.retrieve.draw import ranks
from curate.vectors import Int64, hashed

SCORES_PER_TILE = {"cpu": 1 << 21, "cuda": 1 << 28}  # float32 scores at once: 8 MB stays in cache, 1 GB on a GPU
CANDIDATES_BEFORE_CUT = 1 << 22  # 100 MB of candidates before the best k of each seed are taken

CellBlock = tuple[int, Int64, npt.NDArray[Any]]  # cell, its rows int64[m], their vectors [m, d]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """For each seed its pool rows int64[q, k], best first, and their cosine similarity float64[q, k].

    Equal similarities stand in order of row. Where fewer than k were found: row -1, similarity NaN.
    """

    rows: Int64
    similarity: Float64


def search(
    queries: npt.NDArray[Any],
    probes: npt.NDArray[Any] | None,
    blocks: Iterable[CellBlock],
    k: int,
    device: str = "cpu",
) -> Neighbours:
    """The k nearest by cosine among the rows of the probed cells.

    `queries` [q, d] float16 or float32; `probes` int[q, p] from `cells.nearest` (-1: none), or None for all against
    all. Blocks come in any order, a cell in one block or in several. Memory: the queries in float32, and 24 bytes × k ×
    q plus CANDIDATES_BEFORE_CUT. A worker may search its own cells; `merged` puts the workers' lists together.
    """
    if k < 1:
        raise PlanError(f"search: k is {k}; expected at least 1")
    seeds = _Seeds(queries, k, device)
    visitors = None if probes is None else _visitors(probes)
    everyone = np.flatnonzero(seeds.good)
    for cell, rows, vectors in blocks:
        asking = everyone if visitors is None else visitors(cell)
        asking = asking[seeds.good[asking]]
        if len(asking):
            seeds.meet(asking, rows, widened(vectors))
    return seeds.neighbours()


class _Seeds:
    """The seeds, the best score each has seen k times, and the candidates so far."""

    def __init__(self, queries: npt.NDArray[Any], k: int, device: str) -> None:
        self.k, self.device = k, device
        self.good = usable(queries)
        self.exact = widened(queries)
        self.lengths = norms(np.where(self.good[:, None], self.exact, np.float32(0)))
        self.units = torch.from_numpy(unit(queries)).to(device)
        self.slack = 2 * (queries.shape[1] + 4) * ROUNDING  # two roundings of each of two scores that are compared
        self.best = torch.full((len(queries), k), -torch.inf, device=device)
        self.found: list[tuple[Int64, Float64, Int64]] = []
        self.held = 0

    def meet(self, asking: Int64, rows: Int64, floats: npt.NDArray[np.float32]) -> None:
        """Score one block for the seeds that ask for it; its unusable rows are passed over."""
        on_device = torch.from_numpy(floats).to(self.device)
        lengths = torch.linalg.vector_norm(on_device, dim=1)
        good = torch.isfinite(lengths) & (lengths > 0)
        if not bool(good.all()):
            on_device, lengths, kept = on_device[good], lengths[good], good.cpu().numpy()
            rows, floats = rows[kept], floats[kept]
        if not len(rows):
            return
        step = max(1, SCORES_PER_TILE[torch.device(self.device).type] // len(rows))
        for start in range(0, len(asking), step):
            some = asking[start : start + step]
            at = torch.from_numpy(some).to(self.device)
            seed, column = self._candidates(at, on_device, lengths)
            self._keep(some[seed], rows, floats, column)

    def _candidates(self, at: torch.Tensor, vectors: torch.Tensor, lengths: torch.Tensor) -> tuple[Int64, Int64]:
        """Which (seed of `at`, vector) may belong to the k best of the seed: indices into both."""
        scores = self.units[at] @ vectors.T
        scores /= lengths  # cheaper here than on the vectors, which are wider than the seeds are many
        width = min(self.k + 2, scores.shape[1])
        top, ids = scores.topk(width, dim=1)
        best = torch.cat([self.best[at], top], dim=1).topk(self.k, dim=1).values
        self.best[at] = best
        bar = best[:, -1:] - self.slack
        many = torch.nonzero(top[:, -1:] >= bar)[:, 0] if width < scores.shape[1] else at[:0]
        kept = top >= bar
        kept[many] = False  # more ties than `top` shows: these seeds are looked at in full
        seed, place = torch.nonzero(kept, as_tuple=True)
        column = ids[seed, place]
        if len(many):
            more, columns = torch.nonzero(scores[many] >= bar[many], as_tuple=True)
            seed, column = torch.cat([seed, many[more]]), torch.cat([column, columns])
        return seed.cpu().numpy(), column.cpu().numpy()

    def _keep(self, seed: Int64, rows: Int64, floats: npt.NDArray[np.float32], column: Int64) -> None:
        used, place = np.unique(column, return_inverse=True)
        vectors = floats[used]
        exact = _cosines(self.exact, seed, self.lengths, vectors, place, norms(vectors))
        self.found.append((seed, exact, rows[column]))
        self.held += len(seed)
        if self.held > 2 * self.k * len(self.good) + CANDIDATES_BEFORE_CUT:
            self.found = [_cut(self.found, self.k)]
            self.held = len(self.found[0][0])

    def neighbours(self) -> Neighbours:
        """The k best candidates of each seed."""
        return _table(_cut(self.found, self.k), len(self.good), self.k)


def merged(parts: Iterable[Neighbours], k: int) -> Neighbours:
    """The k best of several workers' lists over the same seeds; a row that two of them found counts once."""
    lists = list(parts)
    found = []
    for part in lists:
        seed, place = np.nonzero(part.rows >= 0)
        found.append((seed.astype(np.int64), part.similarity[seed, place], part.rows[seed, place]))
    return _table(_cut(found, k), len(lists[0].rows), k)


def reranked(
    queries: npt.NDArray[Any],
    candidates: Neighbours,
    fetch: Callable[[Int64], npt.NDArray[Any]],
    k: int,
    seeds_per_pass: int = 4096,
) -> Neighbours:
    """The k best candidates by exact cosine: what a search over codes needs afterwards.

    `fetch` gives the float16 vectors [m, d] of sorted, different rows int64[m]. Memory: the vectors of one pass.
    """
    good, parts = usable(queries), []
    for start in range(0, len(queries), seeds_per_pass):
        part = slice(start, start + seeds_per_pass)
        exact = widened(queries[part])
        seed, place = np.nonzero((candidates.rows[part] >= 0) & good[part, None])
        rows, column = np.unique(candidates.rows[part][seed, place], return_inverse=True)
        floats = widened(fetch(rows))
        with np.errstate(invalid="ignore"):
            similarity = _cosines(exact, seed, norms(exact), floats, column, norms(floats))
        parts.append((seed + start, similarity, rows[column]))
    return _table(_cut(parts, k), len(queries), k)


def exact(queries: npt.NDArray[Any], blocks: Iterable[CellBlock], k: int, device: str = "cpu") -> Neighbours:
    """The k nearest by cosine among all rows: the truth that recall is measured against."""
    return search(queries, None, blocks, k, device)


def recall(found: Neighbours, truth: Neighbours) -> float:
    """recall@k: the share of the true neighbours that were found, over all seeds that have any (NaN without one)."""
    wanted = truth.rows >= 0
    hits = sum(
        int(np.isin(truth.rows[i][wanted[i]], found.rows[i], assume_unique=True).sum()) for i in range(len(truth.rows))
    )
    return hits / int(wanted.sum()) if wanted.any() else float("nan")


def watched(queries: npt.NDArray[Any], count: int, seed: int) -> Int64:
    """Which seeds, int64[≤ count], every run compares with the truth: drawn among the usable ones."""
    good = np.flatnonzero(usable(queries))
    return np.sort(good[np.argsort(hashed(good, seed), kind="stable")[:count]])


def by_cell(cells: npt.NDArray[Any], rows: Int64, vectors: npt.NDArray[Any]) -> Iterator[CellBlock]:
    """Blocks of one cell each, ascending, out of a part of the pool in memory; rows without a cell are left out."""
    order = np.argsort(cells, kind="stable")
    starts = np.flatnonzero(ranks(cells[order]) == 0)
    for start, stop in itertools.pairwise([*starts.tolist(), len(order)]):
        mine = order[start:stop]
        if cells[mine[0]] >= 0:
            yield int(cells[mine[0]]), rows[mine], vectors[mine]


class Codes:
    """Vectors in fewer bytes: FAISS's stand-alone codecs, "SQ8" (d bytes) or "PQ32" (32 bytes) and their like.

    Search over decoded vectors with a k some times larger, then `reranked` on the float16 at rest.
    """

    def __init__(self, index: Any) -> None:
        self.index = index

    @classmethod
    def trained(cls, sample: npt.NDArray[Any], codec: str) -> "Codes":
        """Train on a sample [n, d], as unit vectors. Raises PlanError for a codec that FAISS does not know."""
        try:
            index: Any = faiss.index_factory(sample.shape[1], codec)
            if hasattr(index, "pq"):
                index.do_polysemous_training = False  # an order of centroids for Hamming search: minutes, for nothing
                index.pq.cp.min_points_per_centroid = 1  # a small pool: FAISS would warn once a quantiser
            index.train(unit(sample))
        except RuntimeError as error:
            told = f"search: codec {codec!r} cannot be trained on {len(sample)} vectors: {error}"
            raise PlanError(f"{told}; search a small pool without codes") from error
        return cls(index)

    def packed(self) -> npt.NDArray[np.uint8]:
        """The codec as bytes; `unpacked` is the way back."""
        return np.asarray(faiss.serialize_index(self.index), np.uint8)

    @classmethod
    def unpacked(cls, packed: npt.NDArray[np.uint8]) -> "Codes":
        """A codec that was packed."""
        return cls(faiss.deserialize_index(packed))

    def encode(self, vectors: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Codes uint8[n, bytes] of vectors [n, d]; an unusable row becomes the code of zero."""
        codes: npt.NDArray[np.uint8] = self.index.sa_encode(unit(vectors))
        return codes

    def decode(self, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Approximate unit vectors float32[n, d]."""
        vectors: npt.NDArray[np.float32] = self.index.sa_decode(codes)
        return vectors


def _visitors(probes: npt.NDArray[Any]) -> Callable[[int], Int64]:
    """For a cell, the seeds that probe it, ascending."""
    cells = np.asarray(probes, dtype=np.int64).ravel()
    order = np.argsort(cells, kind="stable")
    ordered_cells, width = cells[order], probes.shape[1]

    def asking(cell: int) -> Int64:
        start, stop = np.searchsorted(ordered_cells, [cell, cell + 1])
        return np.asarray(order[start:stop] // width, dtype=np.int64)

    return asking


def _cosines(
    left: npt.NDArray[Any],
    left_rows: Int64,
    left_lengths: Float64,
    right: npt.NDArray[Any],
    right_rows: Int64,
    right_lengths: Float64,
) -> Float64:
    out = np.empty(len(left_rows))
    for start in range(0, len(out), 4096):
        part = slice(start, start + 4096)
        a, b = left_rows[part], right_rows[part]
        out[part] = dots(left[a], right[b]) / (left_lengths[a] * right_lengths[b])
    return out


def _cut(found: list[tuple[Int64, Float64, Int64]], k: int) -> tuple[Int64, Float64, Int64]:
    """The k best of each seed, by seed, then similarity, then row; a row counts once for a seed."""
    if not found:
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64)
    seed, similarity, rows = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.lexsort((rows, -similarity, seed))
    seed, similarity, rows = seed[order], similarity[order], rows[order]
    fresh = np.concatenate(([True], (seed[1:] != seed[:-1]) | (rows[1:] != rows[:-1])))[: len(seed)]
    seed, similarity, rows = seed[fresh], similarity[fresh], rows[fresh]
    best = ranks(seed) < k
    return seed[best], similarity[best], rows[best]


def _table(found: tuple[Int64, Float64, Int64], seeds: int, k: int) -> Neighbours:
    seed, similarity, rows = found
    table = Neighbours(np.full((seeds, k), -1, dtype=np.int64), np.full((seeds, k), np.nan))
    place = ranks(seed)
    table.rows[seed, place] = rows
    table.similarity[seed, place] = similarity
    return table

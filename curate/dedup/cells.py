"""Near-duplicates among more vectors than one block holds: k-means cells, each vector in its nearest few.

Two vectors are compared where they share a cell, exactly (`cosine`). A pair whose vectors share none is missed, so
recall is measured, not assumed: `measure_recall` compares a sample of rows with all. On vectors without any cluster
structure (Gaussian, d = 512, 512 cells), pairs at cosine 0.9 share one of their 6 nearest cells in 99.65 % of cases,
one of 4 in 96.1 %; comparing only a vector's own cell with the other's 6 finds 93.2 % (simulated).

A pair is reported by the lowest-numbered cell that both share: cells can be worked anywhere, in any order, and their
pairs concatenated. It holds one cell at a time and refuses to guess a threshold.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import faiss
import numpy as np
import numpy.typing as npt
import torch

from curate.dedup.cosine import BYTES_PER_PAIR, cross_above, pairs_above
from curate.dedup.cosine_block import Block, FloatArray, IntArray, VectorArray
from curate.errors import PlanError

CellArray = npt.NDArray[np.int32]

PROBES = 6
# Visitors included. 80,000 Gaussian vectors of 512 took 24 CPU-seconds with 8,000 and 27 with 12,000 (one thread), and
# both found all planted pairs at 0.9.
ROWS_PER_CELL = 8_000
ONE_CELL = 5  # all with all is cheaper, and exact, up to this many times ROWS_PER_CELL: 40,000 rows at 512
SAMPLE_PER_CELL = 128  # training rows; faiss warns below 39
SPLIT_ABOVE = 4  # a cell that would hold this many times ROWS_PER_CELL is split
SPLIT_ROUNDS = 3
TIES_AT_ONCE = 256  # rows decided in float64


@dataclass(frozen=True)
class Recall:
    """How many of the true pairs of a sample of rows were found.

    Attributes:
        rows: sampled rows, each compared with all.
        true: pairs that reach the threshold and have a sampled row.
        found: those of them that the search reported.
    """

    rows: int
    true: int
    found: int

    @property
    def rate(self) -> float:
        """found / true; 1 where the sample has no pair."""
        return self.found / self.true if self.true else 1.0

    @property
    def lower(self) -> float:
        """Lower end of the 95 % Wilson interval of the rate; 0 where the sample has no pair."""
        if not self.true:
            return 0.0
        z2 = 1.96**2
        spread = np.sqrt(self.rate * (1 - self.rate) / self.true + z2 / (4 * self.true**2))
        return float((self.rate + z2 / (2 * self.true) - 1.96 * spread) / (1 + z2 / self.true))


def train_cells(
    sample: VectorArray, n: int, *,
    probes: int = PROBES, rows_per_cell: int = ROWS_PER_CELL, seed: int = 0, iterations: int = 10,
    cells: int | None = None,
) -> FloatArray:  # fmt: skip
    """Place the cells by spherical k-means on a sample, and split those that would hold too many rows.

    Args:
        sample: float16 or float32 [S, d]; at least a few dozen rows per cell are useful.
        n: rows of the corpus.
        probes: cells that each row enters.
        rows_per_cell: rows that a cell should hold, visitors included; more than four times as many are split,
            as far as the sample can tell them apart.
        seed: of the k-means.
        iterations: of Lloyd's algorithm.
        cells: exactly so many (as far as the sample has rows), none of them split: SemDeDup's published cells.

    Returns:
        float32[K, d], unit length; K = 1 where one cell holds all.

    Raises:
        PlanError: wrong dtype or shape, or no usable vector in the sample.
    """
    block = Block(sample, 0.0, None, cut=False)
    unit = np.ascontiguousarray(block.heads.cpu().numpy())
    if not len(unit):
        raise PlanError("train_cells: the sample has no finite, non-zero vector")
    if cells is not None and cells > 1:
        return _k_means(unit, min(len(unit), cells), seed, iterations)
    count = min(len(unit), max(1, round(n * probes / rows_per_cell)))
    if cells == 1 or n <= ONE_CELL * rows_per_cell or count == 1:
        mean = unit.mean(axis=0, keepdims=True)
        return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), np.float32)
    centres = _k_means(unit, count, seed, iterations)
    for _ in range(SPLIT_ROUNDS):
        entered = assign_cells(unit, centres, probes)[0]
        rows = np.bincount(entered.ravel(), minlength=len(centres)) * (n / len(unit))
        large = np.flatnonzero(rows > SPLIT_ABOVE * rows_per_cell)
        if not len(large):
            break
        kept = [np.delete(centres, large, axis=0)]
        for cell in large:
            members = unit[(entered == cell).any(axis=1)]
            kept.append(_k_means(members, min(len(members), int(-(-rows[cell] // rows_per_cell))), seed, iterations))
        centres = np.concatenate(kept)
    return centres


def assign_cells(
    vectors: VectorArray, centres: FloatArray, probes: int = PROBES, *, device: str | None = None
) -> tuple[CellArray, FloatArray]:
    """Find each vector's nearest cells: the same ones on every device.

    Args:
        vectors: float16 or float32 [N, d].
        centres: float32[K, d], unit length.
        probes: cells a vector enters, at most K.
        device: torch device.

    Returns:
        (int32[N, p], float32[N, p]): cells, nearest first, and the cosine to their centres; p = min(probes, K). Rows
        that match nothing (zero, NaN) get cell -1 throughout.

    Raises:
        PlanError: wrong dtype or shape.
    """
    p = min(probes, len(centres))
    cells = np.full((len(vectors), p), -1, np.int32)
    nearness = np.zeros((len(vectors), p), np.float32)
    for start in range(0, len(vectors), 1 << 14):
        block = Block(vectors[start : start + (1 << 14)], 0.0, device, cut=False)
        place = torch.from_numpy(centres).to(block.device)
        near, which = (block.heads @ place.T).topk(min(p + 1, len(centres)), dim=1)
        if p < len(centres):  # which of two is in and which out, where float32 cannot tell
            close = (near[:, p - 1] - near[:, p] <= 2 * block.rounding).nonzero().flatten()
            for some in torch.split(close, TIES_AT_ONCE):
                exact = block.wide(block.rows[some.cpu().numpy()]) @ place.double().T
                which[some, :p] = exact.topk(p, dim=1).indices
                near[some, :p] = exact.gather(1, which[some, :p]).float()
        cells[start + block.rows] = which[:, :p].int().cpu().numpy()
        nearness[start + block.rows] = near[:, :p].cpu().numpy()
    return cells, nearness


def pairs_in_cell(
    vectors: VectorArray, cells: CellArray, cell: int, threshold: float, *,
    device: str | None = None, memory_gb: float = 4.0,
) -> tuple[IntArray, FloatArray]:  # fmt: skip
    """Find one cell's share of the pairs, from all rows that entered it.

    Args:
        vectors: float16 or float32 [n, d], the rows that entered the cell.
        cells: int32[n, p], the cells that each of them entered.
        cell: which cell this is.
        threshold: inclusive cosine.
        device: torch device.
        memory_gb: as in `pairs_above`.

    Returns:
        (int64[M, 2], float32[M]): as `pairs_above`, of those pairs whose lowest common cell this is.
    """
    pairs, cosine = pairs_above(vectors, threshold, device=device, memory_gb=memory_gb)
    mine = lowest_common(cells[pairs[:, 0]], cells[pairs[:, 1]]) == cell
    return pairs[mine], cosine[mine]


def lowest_common(left: CellArray, right: CellArray) -> CellArray:
    """Return, per pair of rows, the lowest cell that both entered; the largest int32 where there is none."""
    none = np.iinfo(np.int32).max
    lowest = np.full(len(left), none, np.int32)
    for column in range(left.shape[1]):
        shared = (right == left[:, column, None]).any(axis=1) & (left[:, column] >= 0)
        np.minimum(lowest, np.where(shared, left[:, column], none), out=lowest)
    return lowest


def pairs_over_cells(
    vectors: VectorArray, centres: FloatArray, threshold: float, *,
    probes: int = PROBES, device: str | None = None, memory_gb: float = 4.0,
) -> tuple[IntArray, FloatArray]:  # fmt: skip
    """Find the pairs that share a cell, cell after cell; with one cell, all pairs.

    Args:
        vectors: float16 or float32 [N, d]; a memory map will do.
        centres: float32[K, d], from `train_cells`.
        threshold: inclusive cosine.
        probes: cells that each row enters.
        device: torch device.
        memory_gb: what the list of pairs may take.

    Returns:
        (int64[M, 2], float32[M]): rows i < j, ascending, each pair once, and their cosine.

    Raises:
        PlanError: wrong dtype or shape, or more pairs than `memory_gb` holds.
    """
    cells, _ = assign_cells(vectors, centres, probes, device=device)
    found: list[tuple[IntArray, FloatArray]] = []
    left_gb = memory_gb
    for cell, rows in rows_of_cells(cells):
        pairs, cosine = pairs_in_cell(
            vectors[rows], cells[rows], cell, threshold, device=device, memory_gb=max(left_gb, 0.0)
        )
        found.append((rows[pairs], cosine))
        left_gb -= len(pairs) * BYTES_PER_PAIR * 1e-9
    return _ascending(found)


def measure_recall(
    vectors: VectorArray, threshold: float, pairs: IntArray, *,
    rows: int = 2_048, seed: int = 0, device: str | None = None,
) -> Recall:  # fmt: skip
    """Compare a random sample of rows with all rows, and count which true pairs are among `pairs`.

    Args:
        vectors: float16 or float32 [N, d].
        threshold: inclusive cosine.
        pairs: int64[M, 2], i < j, what a search found.
        rows: sample size.
        seed: of the sample.
        device: torch device.

    Returns:
        The counts; a pair with both rows sampled counts once.
    """
    n = len(vectors)
    chosen = np.sort(np.random.default_rng(seed).choice(n, min(rows, n), replace=False))
    hits, _ = cross_above(vectors[chosen], vectors, threshold, device=device)
    i, j = chosen[hits[:, 0]], hits[:, 1]
    truth = np.unique((np.minimum(i, j) * n + np.maximum(i, j))[i != j])
    return Recall(len(chosen), len(truth), int(np.isin(truth, pairs[:, 0] * n + pairs[:, 1]).sum()))


def _k_means(unit: FloatArray, count: int, seed: int, iterations: int) -> FloatArray:
    means = faiss.Kmeans(
        unit.shape[1], count, niter=iterations, seed=seed, spherical=True,
        gpu=getattr(faiss, "get_num_gpus", int)() > 0,
        min_points_per_centroid=1, max_points_per_centroid=SAMPLE_PER_CELL,
    )  # fmt: skip
    means.train(unit)
    return np.asarray(means.centroids, np.float32).reshape(-1, unit.shape[1])


def rows_of_cells(cells: CellArray) -> Iterator[tuple[int, IntArray]]:
    """Yield each cell and the rows that entered it, both ascending."""
    flat = cells.ravel()
    order = np.argsort(flat, kind="stable")
    edges = np.flatnonzero(np.r_[True, np.diff(flat[order]) != 0, True]) if len(flat) else np.zeros(1, np.int64)
    for start, stop in pairwise(edges):
        if (cell := int(flat[order[start]])) >= 0:
            yield cell, order[start:stop] // cells.shape[1]


def _ascending(found: list[tuple[IntArray, FloatArray]]) -> tuple[IntArray, FloatArray]:
    """Concatenate, sort, and drop repeats."""
    pairs = np.concatenate([np.empty((0, 2), np.int64), *[part[0] for part in found]])
    cosine = np.concatenate([np.empty(0, np.float32), *[part[1] for part in found]])
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs, cosine = pairs[order], cosine[order]
    new = np.r_[True, (pairs[1:] != pairs[:-1]).any(axis=1)][: len(pairs)]
    return pairs[new], cosine[new]


def keep_nearest(found: list[tuple[IntArray, FloatArray]], neighbours: int) -> tuple[IntArray, FloatArray]:
    """Merge edges of several cells, ascending, each once, and keep those among either end's nearest `neighbours`."""
    pairs, cosine = _ascending(found)
    kept = _nearest(pairs, cosine, neighbours)
    return pairs[kept], cosine[kept]


def _nearest(pairs: IntArray, cosine: FloatArray, neighbours: int) -> npt.NDArray[np.bool_]:
    """Tell which pairs are among the nearest `neighbours` of either end; equal cosines rank by the lower row."""
    ends = np.concatenate([pairs, pairs[:, ::-1]])
    order = np.lexsort((ends[:, 1], -np.tile(cosine, 2), ends[:, 0]))
    rows = ends[order, 0]
    start = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]][: len(rows)])
    place = np.arange(len(rows)) - np.repeat(start, np.diff(np.r_[start, len(rows)]))
    kept = np.zeros(len(pairs), np.bool_)
    kept[order[place < neighbours] % max(1, len(pairs))] = True
    return kept

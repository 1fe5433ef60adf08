"""The pool's one vector structure: k-means cells, trained on a sample and assigned in streamed blocks.

Retrieval searches them, cluster-based retrieval and balancing count them. Lloyd's k-means is FAISS's (on the GPU where
`device` is one); mini-batches, seeding and assignment are here, because the assignment must not depend on the size of a
block, on threads or on the device: near-ties are settled in float64. A row without a usable
vector (zero, NaN, infinite) gets cell -1. It refuses to train on fewer usable points than cells.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
import numpy.typing as npt
import torch

from curate.errors import PlanError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Metric = Literal["cosine", "l2", "ip"]

TILE_COLUMNS = 4096  # centroids a tile: with 512 rows 8 MB of scores; untiled, page faults made the product 3 × slower
TILE_ROWS = {"cpu": 512, "cuda": 32768}
EXACT_ROWS = 4096  # rows of float64 at once in `dots`: 2 × 32 MB at 1024 dimensions
DRAWS_PER_ROUND = 512  # k-means++ candidates that share one matrix product
ROUNDING = 2.0**-23  # twice float32's unit: times d, a bound on the error of a dot product in any order of summation


@dataclass(frozen=True, eq=False)
class Cells:
    """Centroids float32[c, d] and how a vector finds its own.

    "cosine": largest cosine (centroids have unit length); "l2": smallest Euclidean distance; "ip": largest inner
    product with centroids as they are, which is how DataComp uses its L2-trained ones (RECIPES section 11).
    """

    centroids: Float32
    metric: Metric = "cosine"

    def __post_init__(self) -> None:
        if self.centroids.ndim != 2 or len(self.centroids) == 0 or not np.isfinite(self.centroids).all():
            raise PlanError("cells: centroids must be a finite, non-empty float32 matrix")
        if self.metric not in ("cosine", "l2", "ip"):
            raise PlanError(f"cells: metric is {self.metric!r}; expected 'cosine', 'l2' or 'ip'")


def usable(vectors: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """bool[n]: which rows are finite and not zero."""
    floats = widened(vectors)
    low, high = floats.min(axis=1, initial=0), floats.max(axis=1, initial=0)
    return np.asarray(np.isfinite(low) & np.isfinite(high) & ((low < 0) | (high > 0)))


def widened(vectors: npt.NDArray[Any]) -> Float32:
    """float32[n, d] of rows of any float type. By torch: numpy's own conversion took longer than the product."""
    rows = np.ascontiguousarray(vectors)
    if rows.dtype == np.longdouble:  # which torch does not know
        rows = rows.astype(np.float64)
    if not rows.flags.writeable:  # a memory map; torch warns of what it cannot guard
        rows = rows.copy()
    floats: Float32 = torch.from_numpy(rows).float().numpy()
    return floats


def unit(vectors: npt.NDArray[Any]) -> Float32:
    """Rows as float32 of length 1; unusable rows become zero."""
    rows = np.where(usable(vectors)[:, None], widened(vectors), np.float32(0))
    lengths = norms(rows)
    lengths[lengths == 0] = 1.0
    return np.asarray(rows / lengths[:, None], dtype=np.float32)


def norms(vectors: npt.NDArray[Any]) -> Float64:
    """Euclidean lengths float64[n], the same for a row whatever stands beside it."""
    return np.sqrt(dots(vectors, vectors))


def dots(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> Float64:
    """Row-wise inner products float64[n] of [n, d] and [n, d], the same for a pair whatever stands beside it."""
    out = np.empty(len(left), dtype=np.float64)
    for start in range(0, len(left), EXACT_ROWS):
        rows = slice(start, start + EXACT_ROWS)
        out[rows] = np.multiply(left[rows], right[rows], dtype=np.float64).sum(axis=1)
    return out


def train(
    points: npt.NDArray[Any],
    n_cells: int,
    metric: Literal["cosine", "l2"] = "cosine",
    init: Literal["kmeans++", "random"] = "kmeans++",
    iterations: int = 20,
    seed: int = 0,
    device: str = "cpu",
    batch: int | None = None,
) -> Cells:
    """k-means of all `points` [n, d], float16 or float32; unusable rows are left out. `iterations` passes over them.

    Without `batch` Lloyd's by FAISS, which splits a large cell where one runs empty; with it, centroids move after so
    many points, and one that nothing is nearest to stays where it was. "cosine" is spherical k-means. Memory: a float32
    copy of the points. Raises PlanError when fewer usable points than cells are given.
    """
    floats = _usable_floats(points, metric)
    if len(floats) < n_cells or n_cells < 1:
        raise PlanError(f"cells: {n_cells} cells asked of {len(floats)} usable vectors; lower the number of cells")
    rng = np.random.default_rng(seed)
    if init == "kmeans++":
        first = plus_plus(floats, n_cells, rng, device)
    elif init == "random":
        first = rng.choice(len(floats), n_cells, replace=False)
    else:
        raise PlanError(f"cells: init is {init!r}; expected 'kmeans++' or 'random'")
    centroids = floats[first]
    if batch is not None:
        centroids = _mini_batches(floats, centroids, metric, batch, iterations, rng, device)
    elif iterations > 0 and len(floats) > n_cells:
        kmeans = faiss.Kmeans(
            floats.shape[1],
            n_cells,
            niter=iterations,
            spherical=metric == "cosine",
            gpu=device.startswith("cuda"),
            seed=int(rng.integers(1 << 31)),
            min_points_per_centroid=1,
            max_points_per_centroid=len(floats),  # the caller drew the sample
        )
        kmeans.train(floats, init_centroids=centroids)
        centroids = np.asarray(kmeans.centroids, dtype=np.float32).reshape(n_cells, -1)
    return Cells(centroids, metric)


def _usable_floats(points: npt.NDArray[Any], metric: Literal["cosine", "l2"]) -> Float32:
    """The usable rows as float32, of length 1 for "cosine"; block by block, since a sample has tens of gigabytes."""
    blocks = [slice(start, start + EXACT_ROWS) for start in range(0, len(points), EXACT_ROWS)]
    good = [usable(points[rows]) for rows in blocks]
    floats = np.empty((sum(int(some.sum()) for some in good), points.shape[1]), np.float32)
    filled = 0
    for rows, some in zip(blocks, good, strict=True):
        part = points[rows][some]
        floats[filled : filled + len(part)] = unit(part) if metric == "cosine" else widened(part)
        filled += len(part)
    return floats


def _mini_batches(
    points: Float32, centroids: Float32, metric: Literal["cosine", "l2"], batch: int, iterations: int,
    rng: np.random.Generator, device: str,
) -> Float32:  # fmt: skip
    """k-means by mini-batches (Sculley 2010, algorithm 1): after each, a centroid is the mean of all it was given."""
    means, given = centroids.astype(np.float64), np.zeros(len(centroids), np.int64)
    for _ in range(iterations):
        order = rng.permutation(len(points))
        for start in range(0, len(order), batch):
            some = points[order[start : start + batch]]
            members = nearest(Cells(centroids, metric), some, 1, device)[:, 0]
            by_cell = np.argsort(members, kind="stable")
            found, starts, counts = np.unique(members[by_cell], return_index=True, return_counts=True)
            sums = np.add.reduceat(some[by_cell].astype(np.float64), starts, axis=0)
            given[found] += counts
            means[found] += (sums - counts[:, None] * means[found]) / given[found, None]
            moved = means[found].astype(np.float32)
            centroids[found] = unit(moved) if metric == "cosine" else moved
    return centroids


def plus_plus(points: Float32, n_cells: int, rng: np.random.Generator, device: str = "cpu") -> npt.NDArray[np.int64]:
    """The rows that k-means++ (Arthur & Vassilvitskii 2007) picks as first centroids.

    Exactly its distribution, but in rounds: candidates are drawn with the squared distances as they stood when the
    round began, and one is accepted with the share of its distance that is left: one matrix product a round.
    """
    on_device = torch.from_numpy(points).to(device)
    step = TILE_ROWS[on_device.device.type]
    lengths = torch.cat([(part * part).sum(dim=1) for part in torch.split(on_device, step)])
    chosen = [int(rng.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    fresh = list(chosen)
    while True:
        nearest = np.minimum(nearest, _squared(on_device, lengths, fresh))
        nearest[fresh] = 0.0
        if len(chosen) == n_cells:
            return np.array(chosen, dtype=np.int64)
        cumulated = np.cumsum(nearest)
        if cumulated[-1] <= 0:  # fewer different points than cells
            rest = np.setdiff1d(np.arange(len(points)), chosen)
            chosen += rng.choice(rest, n_cells - len(chosen), replace=False).tolist()
            return np.array(chosen, dtype=np.int64)
        count = min(max(len(chosen), 8), DRAWS_PER_ROUND)
        drawn = np.searchsorted(cumulated, rng.random(count) * cumulated[-1], side="right").clip(max=len(points) - 1)
        fresh = _accepted(drawn, nearest[drawn], points[drawn], rng.random(count), n_cells - len(chosen))
        chosen += fresh


def _squared(points: torch.Tensor, lengths: torch.Tensor, rows: list[int]) -> Float64:
    """Squared distance of every point to the nearest of `rows`, float64[n]."""
    if not rows:
        return np.full(len(points), np.inf)
    centres = points[rows]
    step = TILE_ROWS[points.device.type]
    best = [
        (lengths[rows][None] - 2 * (points[start : start + step] @ centres.T)).amin(dim=1)
        for start in range(0, len(points), step)
    ]
    return np.asarray((torch.cat(best) + lengths).clamp_(min=0).cpu().numpy(), dtype=np.float64)


def _accepted(
    drawn: npt.NDArray[np.int64], before: Float64, points: Float32, uniform: Float64, wanted: int
) -> list[int]:
    pairs = ((points**2).sum(1)[:, None] + (points**2).sum(1)[None] - 2 * points @ points.T).clip(min=0)
    now = before.copy()
    fresh: list[int] = []
    for index in range(len(drawn)):
        if len(fresh) < wanted and before[index] > 0 and uniform[index] * before[index] < now[index]:
            fresh.append(int(drawn[index]))
            now = np.minimum(now, pairs[index])
            now[drawn == drawn[index]] = 0.0  # exactly: a point is chosen once
    return fresh


def assign(cells: Cells, blocks: Iterable[npt.NDArray[Any]], device: str = "cpu") -> Iterator[tuple[Int32, Float32]]:
    """The cell of every row, block by block: (cells int32[n], distances float32[n]).

    The distance is 1 - cosine, the Euclidean distance, or minus the inner product; NaN where the cell is -1. The same
    for a row whatever block it comes in: equal nearest centroids go to the smaller number.
    """
    for block in blocks:
        members = nearest(cells, block, 1, device)[:, 0]
        yield members, distances(cells, block, members)


def distances(cells: Cells, vectors: npt.NDArray[Any], members: Int32) -> Float32:
    """float32[n]: the distance of each row to the centroid of its cell, NaN for cell -1."""
    out = np.full(len(vectors), np.nan, dtype=np.float32)
    lengths = norms(cells.centroids)
    lengths[lengths == 0] = 1.0  # the mean of opposite vectors: cosine 0 to all
    for start in range(0, len(vectors), EXACT_ROWS):
        rows = start + np.flatnonzero(members[start : start + EXACT_ROWS] >= 0)
        points, centres = widened(vectors[rows]), cells.centroids[members[rows]]
        if cells.metric == "l2":
            gap = points.astype(np.float64) - centres
            out[rows] = np.sqrt((gap * gap).sum(axis=1))
        elif cells.metric == "ip":
            out[rows] = -dots(points, centres)
        else:
            cosine = dots(points, centres) / (norms(points) * lengths[members[rows]])
            out[rows] = np.maximum(1.0 - cosine, 0.0)
    return out


def nearest(cells: Cells, vectors: npt.NDArray[Any], count: int, device: str = "cpu") -> Int32:
    """The `count` nearest cells of each row, int32[n, count], nearest first; -1 for unusable rows and beyond all cells.

    Scores are float32 products. Wherever rounding could change which cells are among the `count`, the candidates are
    scored again in float64, so the set is exact; its order is exact too for count 1.
    """
    centroids = torch.from_numpy(cells.centroids).to(device)
    bias = (centroids * centroids).sum(dim=1) / -2 if cells.metric == "l2" else None
    longest = float(norms(cells.centroids).max())
    out = np.full((len(vectors), count), -1, dtype=np.int32)
    step = TILE_ROWS[torch.device(device).type]
    scores = torch.empty(step, min(TILE_COLUMNS, len(centroids)), device=device)  # one buffer for every tile
    for start in range(0, len(vectors), step):
        good = start + np.flatnonzero(usable(vectors[start : start + step]))
        rows = torch.from_numpy(widened(vectors[good])).to(device)
        lengths = rows.norm(dim=1).cpu().numpy()
        slack = vectors.shape[1] * ROUNDING * (lengths * longest + longest**2 * (bias is not None))
        pending, width = np.arange(len(good)), min(count + 1, len(centroids))
        while len(pending):
            top, ids = _top(rows[torch.from_numpy(pending).to(device)], centroids, bias, width, scores)
            certain = np.full(len(pending), width == len(centroids))
            kth = top[:, min(count, width) - 1]
            if width < len(centroids):
                certain |= top[:, -1] < kth - 2 * slack[pending]
            close = certain & (width > count) & (top[:, min(count, width - 1)] >= kth - 2 * slack[pending])
            keep = min(count, width)
            out[good[pending[certain]], :keep] = ids[certain, :keep]
            for row in np.flatnonzero(close):
                out[good[pending[row]], :keep] = _settled(cells, vectors[good[pending[row]]], ids[row])[:keep]
            pending, width = pending[~certain], min(4 * width, len(centroids))
    return out


def _top(
    rows: torch.Tensor, centroids: torch.Tensor, bias: torch.Tensor | None, width: int, buffer: torch.Tensor
) -> tuple[Float32, npt.NDArray[np.int64]]:
    """Scores and numbers of the `width` best centroids of each row, best first."""
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(centroids), TILE_COLUMNS):
        columns = slice(start, start + TILE_COLUMNS)
        scores = buffer.view(-1)[: len(rows) * len(centroids[columns])].view(len(rows), -1)
        torch.mm(rows, centroids[columns].T, out=scores)
        if bias is not None:
            scores += bias[columns]
        top, ids = scores.topk(min(width, scores.shape[1]), dim=1)
        best.append((top, ids + start))
    top, ids = (torch.cat(columns, dim=1) for columns in zip(*best, strict=True))
    if len(best) > 1:
        top, order = top.topk(width, dim=1)
        ids = ids.gather(1, order)
    return top.cpu().numpy(), ids.cpu().numpy()


def _settled(cells: Cells, vector: npt.NDArray[Any], candidates: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The candidates by exact score, equal ones by number."""
    centres = cells.centroids[candidates].astype(np.float64)
    scores = dots(centres, np.broadcast_to(vector.astype(np.float64), centres.shape))
    if cells.metric == "l2":
        scores -= dots(centres, centres) / 2
    return candidates[np.lexsort((candidates, -scores))]

"""Rows of one block on a device: float32 products propose pairs, float64 decides them.

To propose cheaply, rows are rotated onto their principal axes and cut after k of d axes: by Cauchy-Schwarz
x·y <= head(x)·head(y) + |tail(x)|·|tail(y)|, one product of k + 1 columns. k is what costs least on a sample; no pair
can be lost by it.

It refuses vectors that are not float16 or float32 [N, d]; zero, NaN and infinite rows are left out of the block.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from curate.errors import PlanError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
VectorArray = npt.NDArray[np.float16] | npt.NDArray[np.float32]

RECHECK_VALUES = 1 << 22  # values gathered at a time for a float64 dot product: 64 MB
CACHED_ROWS = 1_024  # rows converted at a time
SAMPLE_ROWS = 1_024
MIN_ROWS_FOR_HEADS = 4_096  # below, finding the axes costs more than it saves
# Time of deciding one proposed pair, in multiply-adds of the product: an estimate. Recomputing a pair by itself takes
# about 310,000 at d = 512 (7.9 us, one core), but where a tile has many, one full product rules most of them out.
RECHECK_COST = 40_000


class Block:
    """Rows of finite, non-zero vectors on a device: proposes pairs by float32 products, decides them in float64.

    Attributes:
        rows: int64[n], the row of `vectors` that each row of the block stands for.
        heads: float32[n, k + 1] on the device; products of two of them bound the cosine from above.
        floor: a product below it cannot belong to a pair that reaches the threshold.
        is_cut: whether `heads` are shorter than the vectors.
    """

    def __init__(
        self, vectors: VectorArray, threshold: float, device: str | None = None, *,
        only: IntArray | None = None, strict: bool = False, cut: bool = True,
    ) -> None:  # fmt: skip
        check_vectors(vectors, threshold)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.threshold, self.strict = np.float32(threshold), strict
        self.given = torch.from_numpy(np.ascontiguousarray(vectors)).to(self.device)
        self.scale = self._scale()
        usable = self.scale.cpu().numpy() > 0
        if only is not None:
            usable &= only == np.arange(len(vectors))
        self.rows: IntArray = np.flatnonzero(usable)
        self.rounding = rounding_of(vectors.shape[1])
        self.floor = float(self.threshold) - self.rounding
        self.heads = self._heads() if cut else self.unit(self.rows)
        self.is_cut = self.heads.shape[1] != vectors.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def reorder(self, order: IntArray) -> None:
        """Lay the rows of the block in another order."""
        self.rows = self.rows[order]
        self.heads = self.heads[torch.from_numpy(order).to(self.device)]

    def unit(self, rows: IntArray) -> torch.Tensor:
        """Return float32[len(rows), d], normalised, of rows of the given vectors."""
        at = torch.from_numpy(rows).to(self.device)
        scale = self.scale.float()
        parts = [self.given[part].float() * scale[part, None] for part in torch.split(at, CACHED_ROWS)]
        empty = torch.empty((0, self.given.shape[1]), device=self.device)
        return torch.cat(parts) if parts else empty

    def recheck(self, left: IntArray, right: IntArray, *, given: bool = False) -> Iterator[tuple[IntArray, FloatArray]]:
        """Decide proposed pairs by the definition; yields the true ones as rows of the given vectors, i < j.

        `given` says that `left` and `right` are rows of the given vectors already, and not of the block.
        """
        i, j = (left, right) if given else (self.rows[left], self.rows[right])
        size = max(1, RECHECK_VALUES // self.given.shape[1])
        for start in range(0, len(i), size):
            a, b = i[start : start + size], j[start : start + size]
            cosine = self.cosine(a, b)
            true = cosine > self.threshold if self.strict else cosine >= self.threshold
            a, b = a[true], b[true]
            yield np.stack([np.minimum(a, b), np.maximum(a, b)], axis=1), cosine[true]

    def cosine(self, left: IntArray, right: IntArray) -> FloatArray:
        """Compute the cosine of rows of the given vectors by the definition; -inf where one is unusable."""
        return self.cosine_to(left, self, right)

    def cosine_to(self, left: IntArray, other: "Block", right: IntArray) -> FloatArray:
        """Compute the cosine of given rows of this block with given rows of another, as `cosine` does."""
        size = max(1, RECHECK_VALUES // self.given.shape[1])
        parts = [np.empty(0, np.float32)]
        for start in range(0, len(left), size):
            a = torch.from_numpy(left[start : start + size]).to(self.device)
            b = torch.from_numpy(right[start : start + size]).to(self.device)
            scale = self.scale[a] * other.scale[b]
            dot = (self.given[a].double() * other.given[b].double()).sum(dim=1)
            parts.append(torch.where(scale > 0, dot * scale, -torch.inf).float().cpu().numpy())
        return np.concatenate(parts)

    def nearest(self, start: int, stop: int, first: int, neighbours: int) -> tuple[IntArray, IntArray, FloatArray]:
        """Return (i, j, cosine) from rows start … stop of the block to the nearest of its rows from `first` on.

        Those that match only; `first` is not between start and stop.
        """
        bound = self.heads[start:stop] @ self.heads[first:].T
        near = bound >= self.floor
        if start >= first:  # no row is its own neighbour
            near[torch.arange(stop - start), torch.arange(start - first, stop - first)] = False
        crowded = near.sum(dim=1) > 4 * neighbours
        hits = (near & ~crowded[:, None]).nonzero().cpu().numpy()
        i, j = self.rows[start + hits[:, 0]], self.rows[first + hits[:, 1]]
        cosine = self.cosine(i, j)
        true = cosine > self.threshold
        i, j, cosine = i[true], j[true], cosine[true]
        order = np.lexsort((j, -cosine, i))
        i, j, cosine = i[order], j[order], cosine[order]
        new = np.flatnonzero(np.r_[True, i[1:] != i[:-1]]) if len(i) else np.empty(0, np.int64)
        place = np.arange(len(i)) - np.repeat(new, np.diff(np.r_[new, len(i)]))
        keep = place < neighbours
        results = [(i[keep], j[keep], cosine[keep])]
        results += [self._crowded(start + row, first, neighbours) for row in crowded.nonzero().flatten().tolist()]
        return (
            np.concatenate([r[0] for r in results]),
            np.concatenate([r[1] for r in results]),
            np.concatenate([r[2] for r in results]),
        )

    def _crowded(self, row: int, first: int, neighbours: int) -> tuple[IntArray, IntArray, FloatArray]:
        """Rank the rows of the block from `first` on for one of them, by the definition."""
        me, ranked = self.given[self.rows[row]].double(), self.rows[first:]
        at = torch.from_numpy(ranked).to(self.device)
        size = max(1, RECHECK_VALUES // self.given.shape[1])
        dots = torch.cat([(self.given[part].double() * me).sum(dim=1) for part in torch.split(at, size)])
        cosine = (dots * self.scale[at] * self.scale[self.rows[row]]).float().cpu().numpy()
        others = np.flatnonzero((cosine > self.threshold) & (ranked != self.rows[row]))
        best = others[np.lexsort((ranked[others], -cosine[others]))][:neighbours]
        return np.full(len(best), self.rows[row]), ranked[best], cosine[best]

    def _scale(self) -> torch.Tensor:
        """1 / length in float64 per given vector; 0 for what can match nothing."""
        parts = [part.double().square().sum(dim=1) for part in torch.split(self.given, CACHED_ROWS)]
        square = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=self.device)
        return torch.where(torch.isfinite(square) & (square > 0), square.rsqrt(), 0.0)

    def _heads(self) -> torch.Tensor:
        """Cut the rows after as many principal axes as make the search cheapest, and append the length of the rest."""
        width = self.given.shape[1]
        unit = self.unit(self.rows)
        if len(self) < MIN_ROWS_FOR_HEADS or width < 64:
            return unit
        step = max(4, len(self) // SAMPLE_ROWS)
        sample = unit[::step]  # other rows than the axes are fitted to, which look shorter in the tail than they are
        fitted = torch.cat([unit[1::step], unit[2::step], unit[3::step]])
        axes = _principal_axes(fitted.T @ fitted, width // 2)
        best, cost = width, float(width)
        for count in (width // 16 - 1, width // 8 - 1, width // 4 - 1, width // 2 - 1):  # one column is the tail
            cut = self._cut(sample, axes[:, :count])
            rate = float((cut @ cut.T >= self.floor).float().mean()) - 1 / len(sample)  # the diagonal is no pair
            if count + max(0.0, rate) * RECHECK_COST < cost:
                best, cost = count, count + max(0.0, rate) * RECHECK_COST
        if best == width:
            return unit
        return torch.cat([self._cut(part, axes[:, :best]) for part in torch.split(unit, CACHED_ROWS)])

    def _cut(self, unit: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
        head = unit @ axes
        tail = 1 - head.square().sum(dim=1, keepdim=True)
        return torch.cat([head, (tail.clamp(min=0) + 4 * self.rounding).sqrt()], dim=1)


def _principal_axes(scatter: torch.Tensor, count: int) -> torch.Tensor:
    """Find about the `count` strongest axes by one subspace iteration: 15 times cheaper than all eigenvectors at 512.

    Any orthonormal axes keep the bound true; better ones only make it tighter.
    """
    start = np.random.default_rng(0).standard_normal((len(scatter), count)).astype(np.float32)
    basis = torch.linalg.qr(scatter @ (scatter @ torch.from_numpy(start).to(scatter.device)))[0]
    turn: torch.Tensor = torch.linalg.eigh(basis.T @ scatter @ basis)[1].flip(1)
    axes: torch.Tensor = basis @ turn
    return axes


def rounding_of(width: int) -> float:
    """Bound the error of a float32 product of two unit vectors, in the precision that torch is set to."""
    if torch.get_float32_matmul_precision() != "highest":
        return 2.0**-7  # TF32 keeps 10 bits, bfloat16 7
    return float((width + 8) * 2.0**-24)


def check_vectors(vectors: VectorArray, threshold: float) -> None:
    """Raise PlanError unless these are float16 or float32 [N, d] and a cosine."""
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32):
        got = f"{vectors.dtype}{list(vectors.shape)}" if isinstance(vectors, np.ndarray) else type(vectors).__name__
        raise PlanError(f"vectors are {got}; expected float16 or float32 [N, d]")
    if not -1 <= threshold <= 1:
        raise PlanError(f"threshold is {threshold}; expected a cosine, -1 … 1")

"""Rows of one block on a device: float32 products propose pairs, float64 decides them.

To propose cheaply, rows are rotated onto their principal axes and cut after k of d axes: by Cauchy-Schwarz
x·y <= head(x)·head(y) + |tail(x)|·|tail(y)|, one product of k + 1 columns. k is what costs least on a sample. Where the
device multiplies bfloat16 faster, heads are rounded to it, and what the roundest of them lost is taken off the floor.
No pair can be lost by either, so the result is the same with and without.

It refuses vectors that are not float16 or float32 [N, d]; zero, NaN and infinite rows are left out of the block.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from curate.errors import PlanError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
VectorArray = npt.NDArray[np.float16] | npt.NDArray[np.float32]

RECHECK_VALUES = 1 << 22  # values gathered at a time for a float64 dot product: 64 MB
CACHED_ROWS = 1_024  # rows converted at a time
SUM_ROUNDING = 2.0**-40  # of a float64 dot product of unit vectors, whatever the order of the sum
SAMPLE_ROWS = 512
MIN_ROWS_FOR_HEADS = 2_048  # below, finding the axes costs more than it saves
# Time of deciding one proposed pair, in multiply-adds of the product. Recomputing a pair by itself takes about 310,000
# at d = 512 (7.9 us, one core); where a tile has many, one full product rules most of them out. 8,000 Gaussian vectors
# took 0.17 CPU-seconds with 40,000 and 0.13 with 150,000.
RECHECK_COST = 150_000


class Block:
    """Rows of finite, non-zero vectors on a device: proposes pairs by float32 products, decides them in float64.

    Attributes:
        rows: int64[n], the row of `vectors` that each row of the block stands for.
        heads: float32 or bfloat16 [n, k + 1] on the device; products of two of them bound the cosine from above.
        floor: a product of heads below it cannot belong to a pair that reaches the threshold.
        full_floor: the same for float32 products of whole rows.
        is_cut: whether `heads` are less than the vectors, so that a full product rules out more.
        is_extreme: whether some row is too short or too long to be divided by its length in float32.
    """

    def __init__(
        self, vectors: VectorArray, threshold: float, device: str | None = None, *,
        only: IntArray | None = None, strict: bool = False, cut: bool = True,
    ) -> None:  # fmt: skip
        check_vectors(vectors, threshold)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.threshold, self.strict = np.float32(threshold), strict
        self.given = torch.from_numpy(np.require(vectors, requirements=["C", "W"])).to(self.device)
        self.scale = self._scale()
        self.is_extreme = bool((self.scale > 1e37).any() or ((self.scale > 0) & (self.scale < 1e-37)).any())
        usable = self.scale.cpu().numpy() > 0
        if only is not None:
            usable &= only == np.arange(len(vectors))
        self.rows: IntArray = np.flatnonzero(usable)
        self.rounding = rounding_of(vectors.shape[1])
        self.floor = self.full_floor = float(self.threshold) - self.rounding
        self.is_cut = cut and len(self.rows) >= MIN_ROWS_FOR_HEADS and vectors.shape[1] >= 64
        self.heads = self._heads() if self.is_cut else self.unit(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def reorder(self, order: IntArray) -> None:
        """Lay the rows of the block in another order."""
        self.rows = self.rows[order]
        self.heads = self.heads[torch.from_numpy(order).to(self.device)]

    def unit(self, rows: IntArray) -> torch.Tensor:
        """Return float32[len(rows), d], normalised, of rows of the given vectors."""
        at = torch.from_numpy(rows).to(self.device)
        if self.is_extreme:  # 1 / length is no float32
            parts = [self.wide(part).float() for part in np.split(rows, range(CACHED_ROWS, len(rows), CACHED_ROWS))]
        else:
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
        if start >= first:  # no row is its own neighbour
            bound[torch.arange(stop - start), torch.arange(start - first, stop - first)] = -4
        if not bound.numel():
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        having = (bound.amax(dim=1) >= self.floor).nonzero().flatten()
        near = bound[having] >= self.floor
        many = torch.count_nonzero(near, dim=1) > 4 * neighbours
        crowded, having = having[many], having[~many]
        at = near[~many].nonzero()
        hits = [torch.stack([having[at[:, 0]], at[:, 1]], dim=1)]
        tiles = torch.split(crowded, max(1, RECHECK_VALUES // bound.shape[1])) if len(crowded) else ()
        hits += [self._crowded(tile, start, first, neighbours) for tile in tiles]
        left, right = torch.cat(hits).T.cpu().numpy()
        i, j = self.rows[start + left], self.rows[first + right]
        cosine = self.cosine(i, j)
        true = cosine > self.threshold
        i, j, cosine = i[true], j[true], cosine[true]
        order = np.lexsort((j, -cosine, i))
        i, j, cosine = i[order], j[order], cosine[order]
        new = np.flatnonzero(np.r_[True, i[1:] != i[:-1]]) if len(i) else np.empty(0, np.int64)
        place = np.arange(len(i)) - np.repeat(new, np.diff(np.r_[new, len(i)]))
        keep = place < neighbours
        return i[keep], j[keep], cosine[keep]

    def _crowded(self, which: torch.Tensor, start: int, first: int, neighbours: int) -> torch.Tensor:
        """Propose the nearest rows from `first` on of some rows from `start` on: (row, other) from there, int64[M, 2].

        Rows of a crowd are as near as float32 can tell, and those equally near are ranked by row: the nearest by a
        float64 product are taken, and whatever its rounding could put among them.
        """
        mine, others = self.rows[start:][which.cpu().numpy()], self.rows[first:]
        wide = self.wide(mine)
        parts = np.array_split(others, -(-len(others) // CACHED_ROWS))
        product = torch.cat([wide @ self.wide(part).T for part in parts], dim=1)
        if start >= first:
            product[torch.arange(len(which)), which + (start - first)] = -4
        least, most = (product - SUM_ROUNDING).float(), (product + SUM_ROUNDING).float()
        bits = least.view(torch.int32).long()
        rank = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits) * (1 << 32) - torch.from_numpy(others).to(self.device)
        chosen = rank.topk(min(neighbours, len(others)), dim=1).indices
        last = least.gather(1, chosen).amin(dim=1, keepdim=True)
        near = (least != most) & (most >= last)
        near.scatter_(1, chosen, True)
        hits = (near & (most > self.threshold.item())).nonzero()
        return torch.stack([which[hits[:, 0]], hits[:, 1]], dim=1)

    def wide(self, rows: IntArray) -> torch.Tensor:
        """float64[len(rows), d], normalised, of rows of the given vectors."""
        at = torch.from_numpy(rows).to(self.device)
        return self.given[at].double() * self.scale[at, None]

    def _scale(self) -> torch.Tensor:
        """1 / length in float64 per given vector; 0 for what can match nothing."""
        parts = [part.double().square().sum(dim=1) for part in torch.split(self.given, CACHED_ROWS)]
        square = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=self.device)
        return torch.where(torch.isfinite(square) & (square > 0), square.rsqrt(), 0.0)

    def _heads(self) -> torch.Tensor:
        """Cut the rows, append the length of the rest, and round; the floor sinks by what rounding can take."""
        dtype = torch.bfloat16 if multiplies_bfloat16(self.device) else torch.float32
        axes = self._axes(slack=2.0**-7 if dtype == torch.bfloat16 else 0.0)
        columns = self.given.shape[1] if axes is None else axes.shape[1] + 1
        heads = torch.empty((len(self), columns), dtype=dtype, device=self.device)
        lost = 0.0
        for start in range(0, len(self), CACHED_ROWS):
            part = slice(start, start + CACHED_ROWS)
            exact = self.unit(self.rows[part])
            exact = exact if axes is None else self._cut(exact, axes)
            heads[part] = exact
            if dtype == torch.bfloat16:
                lost = max(lost, float((exact - heads[part].float()).norm(dim=1).max()))
        if dtype == torch.bfloat16:  # summed in float32; rounding the sum keeps its order, so the floor is rounded too
            most = 2 * lost + 4 * lost * lost + self.rounding
            most += 2.0**-7 if self.device.type == "cuda" else 0.0  # cuBLAS may add parts in bfloat16
            self.floor = float(torch.tensor(self.floor - most).bfloat16())
        return heads

    def _axes(self, slack: float) -> torch.Tensor | None:
        """As many principal axes as make the search cheapest on a sample; None where whole rows do."""
        width = self.given.shape[1]
        step = max(3, len(self) // SAMPLE_ROWS)
        sample = self.unit(self.rows[::step])  # others than the axes are fitted to, which look shorter in the tail
        fitted = self.unit(np.concatenate([self.rows[1::step], self.rows[2::step]]))
        inevitable = int(torch.count_nonzero(sample @ sample.T >= self.full_floor))
        best, cost = 0, float(width)
        for most in (width // 4, width // 2):  # what suffices is known before more axes are found
            axes = _principal_axes(fitted, most - 1)
            head = sample @ axes
            product, done = torch.zeros((len(sample), len(sample)), device=self.device), 0
            for count in range(width // 16, most + 1, width // 32):  # columns, the last is the tail
                product.addmm_(head[:, done : count - 1], head[:, done : count - 1].T)
                done = count - 1
                tail = (1 - head[:, :done].square().sum(dim=1)).clamp(min=0).sqrt()
                proposed = int(torch.count_nonzero(product + torch.outer(tail, tail) >= self.floor - slack))
                needless = max(0, proposed - inevitable) / len(sample) ** 2
                if count + needless * RECHECK_COST < cost:
                    best, cost = done, count + needless * RECHECK_COST
            if cost <= most:
                break
        return axes[:, :best] if best else None

    def _cut(self, unit: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
        head = unit @ axes
        tail = 1 - head.square().sum(dim=1, keepdim=True)
        return torch.cat([head, (tail.clamp(min=0) + 4 * self.rounding).sqrt()], dim=1)


def _principal_axes(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Find about the `count` strongest axes by one subspace iteration: 15 times cheaper than all eigenvectors at 512.

    Any orthonormal axes keep the bound true; better ones only make it tighter.
    """
    start = np.random.default_rng(0).standard_normal((rows.shape[1], count)).astype(np.float32)
    basis = torch.linalg.qr(rows.T @ (rows @ torch.from_numpy(start).to(rows.device)))[0]
    seen = rows @ basis
    turn: torch.Tensor = torch.linalg.eigh(seen.T @ seen)[1].flip(1)
    axes: torch.Tensor = basis @ turn
    return axes


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32: about twice on a CPU with avx512_bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(told.get("avx512_bf16") or told.get("amx_bf16"))


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

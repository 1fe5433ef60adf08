"""MoDE: captions are clustered into experts, by balanced k-means twice: 1,024 fine cells, then their centres into n.

Source: facebookresearch/MetaCLIP apps/mode (RECIPES section 7): features of unit length, Euclidean, every caption goes
to its nearest fine centre, and an expert is the fine cells of one coarse cell. Balance holds while training; captions
are assigned freely, as published. The published code is not seeded; this is. It refuses to train on fewer usable
features than cells.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from curate.errors import PlanError

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

ROWS_PER_BATCH = 1 << 14  # balanced together: 64 MB of float32 similarities to 1,024 centres
ROWS_PER_TILE = 1 << 11
BID_STEP = (
    0.01  # the auction's ε: 0.005 gained 0.00005 of mean similarity for 1.5 × the time (16,000 points, 256 cells)
)
MOVED = 1e-4  # training ends when the centres move less than this on average, as unit vectors


@dataclass(frozen=True, eq=False)
class Experts:
    """Fine centres float32[m, d], coarse centres float32[n, d], and the coarse cell int32[m] of each fine one."""

    fine: Float32
    coarse: Float32
    expert_of_fine: Int32


def train(
    features: npt.NDArray[Any],
    fine: int = 1024,
    coarse: int = 4,
    fine_iterations: int = 50,
    coarse_iterations: int = 100,
    seed: int = 0,
    device: str = "cpu",
) -> Experts:
    """Both clusterings of a sample of caption features [n, d], float16 or float32; unusable rows are left out.

    Defaults are the published numbers. Memory: a float32 copy of the sample. Raises PlanError for too few features.
    """
    units, good = unit(features)
    centres = balanced_kmeans(units[good], fine, fine_iterations, seed, device)
    upper = balanced_kmeans(centres, coarse, coarse_iterations, seed + 1, device)
    scores = np.asarray(centres @ upper.T)
    return Experts(centres, upper, balanced_assignment(scores, -(-fine // coarse)).astype(np.int32))


def assign(experts: Experts, blocks: Iterable[npt.NDArray[Any]], device: str = "cpu") -> Iterator[tuple[Int32, Int32]]:
    """(fine cell int32[n], expert int32[n]) of every row, block by block; -1 for an unusable feature.

    The same for a row whatever block it comes in: scores within float32's rounding of the best are settled in float64,
    and equal ones go to the smaller number.
    """
    centres = torch.from_numpy(experts.fine).to(device)
    exact = experts.fine.astype(np.float64)
    # |x - c|² orders as x·c - |c|²/2: the balanced centres are means of unit vectors, not unit vectors.
    bias = (exact * exact).sum(axis=1) / 2
    slack = 4 * experts.fine.shape[1] * 2.0**-23
    for block in blocks:
        units, good = unit(block)
        members = np.full(len(units), -1, dtype=np.int32)
        for start in range(0, len(units), ROWS_PER_TILE):
            rows = start + np.flatnonzero(good[start : start + ROWS_PER_TILE])
            scores = (torch.from_numpy(units[rows]).to(device) @ centres.T).cpu().numpy() - bias.astype(np.float32)
            best = scores.argmax(axis=1)
            near = scores >= scores.max(axis=1, keepdims=True, initial=-np.inf) - slack
            for row in np.flatnonzero(near.sum(axis=1) > 1):
                cells = np.flatnonzero(near[row])
                held = (exact[cells] * units[rows[row]].astype(np.float64)).sum(axis=1) - bias[cells]
                best[row] = cells[int(held.argmax())]
            members[rows] = best
        yield members, np.where(members >= 0, experts.expert_of_fine[members], -1).astype(np.int32)


def balanced_kmeans(points: Float32, count: int, iterations: int, seed: int, device: str = "cpu") -> Float32:
    """Centres float32[count, d] of k-means in which every cell gets the same number of points (±1 in rounding up).

    Points [n, d] go in batches of ROWS_PER_BATCH, drawn by seed; each batch is balanced on its own, as the published
    code does with its files; the centres move once per pass to the mean of what they were given.
    """
    if count < 1 or len(points) < count:
        raise PlanError(f"mode: {count} cells asked of {len(points)} usable features; lower the number of cells")
    rng = np.random.default_rng(seed)
    centres = points[rng.choice(len(points), count, replace=False)]
    order = rng.permutation(len(points))
    batches = max(1, len(points) // max(ROWS_PER_BATCH, 8 * count))  # at least 8 points a cell in each batch
    for _ in range(iterations):
        sums, sizes = np.zeros(centres.shape, np.float64), np.zeros(count, np.int64)
        for rows in np.array_split(order, batches):
            batch = points[rows]
            scores = _closeness(batch, centres, device)
            members = balanced_assignment(scores, -(-len(rows) // count))
            np.add.at(sums, members, batch.astype(np.float64))
            sizes += np.bincount(members, minlength=count)
        moved = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres).astype(np.float32)
        step = float(np.sqrt(((moved - centres) ** 2).sum(axis=1)).mean())
        centres = moved
        if step < MOVED:
            break
    return centres


def _closeness(points: Float32, centres: Float32, device: str) -> Float32:
    """x·c - |c|²/2, float32[n, c]: larger is nearer."""
    there = torch.from_numpy(centres).to(device)
    scores = torch.from_numpy(points).to(device) @ there.T - (there * there).sum(dim=1) / 2
    return np.asarray(scores.cpu().numpy(), dtype=np.float32)


def balanced_assignment(scores: npt.NDArray[Any], capacity: int, step: float = BID_STEP) -> Int64:
    """int64[n]: a cell for every point such that none has more than `capacity`, with a nearly greatest sum of scores.

    Auction (Bertsekas 1992): points without a cell bid what their best cell is worth to them above their second best,
    plus `step`; a cell keeps its `capacity` highest bidders. The sum is within n · step of the greatest. Ties go to the
    smaller index. `scores` float[n, c], larger is nearer. Raises PlanError when capacity · c < n.
    """
    points, cells = scores.shape
    if capacity * cells < points:
        raise PlanError(f"mode: {points} points do not fit {cells} cells of {capacity}")
    if cells == 1 or points == 0:
        return np.zeros(points, dtype=np.int64)
    members = np.full(points, -1, dtype=np.int64)
    bids, prices = np.zeros(points), np.zeros(cells)
    while True:
        free = np.flatnonzero(members < 0)
        if not len(free):
            return members
        worth = scores[free] - prices
        two = np.argpartition(-worth, 1, axis=1)[:, :2]
        value = np.take_along_axis(worth, two, axis=1)
        best = np.where(value[:, 0] >= value[:, 1], two[:, 0], two[:, 1])
        members[free] = best
        bids[free] = prices[best] + np.abs(value[:, 0] - value[:, 1]) + step
        touched = np.zeros(cells, dtype=bool)
        touched[best] = True
        rows = np.flatnonzero(touched[members])
        order = rows[np.lexsort((-bids[rows], members[rows]))]
        place = _places(members[order])
        last = order[place == capacity - 1]  # full cells: their lowest bid is the price to beat
        prices[members[last]] = bids[last]
        members[order[place >= capacity]] = -1


def _places(groups: Int64) -> Int64:
    starts = np.flatnonzero(np.concatenate(([True], groups[1:] != groups[:-1])))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))


def unit(features: npt.NDArray[Any]) -> tuple[Float32, npt.NDArray[np.bool_]]:
    """Rows as float32 of length 1, and which are usable; zero, NaN and infinite rows become zero."""
    floats = features.astype(np.float32)
    lengths = np.sqrt(np.multiply(floats, floats, dtype=np.float64).sum(axis=1))
    good = np.isfinite(lengths) & (lengths > 0)
    units = np.where(good[:, None], floats, np.float32(0)) / np.where(good, lengths, 1.0)[:, None]
    return units.astype(np.float32), good

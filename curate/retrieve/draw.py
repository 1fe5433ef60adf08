"""Seeded draws that no block size and no number of workers can change: the smallest hashes or distances of a group.

A random draw is "the rows with the smallest hash of (seed, key)", so that any worker can draw its part and the parts
merge. It refuses generators whose state depends on the order in which rows arrive.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from curate.errors import PlanError
from curate.vectors import Int64, UInt64

SPARE_ROWS = 1 << 20  # buffered beyond what is kept before a sort: 24 MB, and one sort a million rows


def ordered(distances: npt.NDArray[Any]) -> UInt64:
    """uint64[n] in the order of the distances (float, not negative); NaN comes last."""
    bits: UInt64 = np.ascontiguousarray(distances, dtype=np.float64).view(np.uint64).copy()
    bits[np.isnan(distances)] = np.uint64(2**64 - 1)
    if (bits >> np.uint64(63))[~np.isnan(distances)].any():
        bits[distances == 0] = 0  # minus zero
        if (np.asarray(distances) < 0).any():
            raise PlanError("draw: a distance is negative; distances are 1 - cosine or Euclidean")
    return bits


def ranks(groups: npt.NDArray[Any]) -> Int64:
    """The position of each item within its group, for groups that are already sorted: [5, 5, 7] -> [0, 1, 0]."""
    count = len(groups)
    if count == 0:
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.concatenate(([True], groups[1:] != groups[:-1])))
    return np.arange(count) - np.repeat(starts, np.diff(np.append(starts, count)))


class Smallest:
    """The rows with the smallest priorities of each group, from blocks in any order.

    `limits` is int64[groups]: how many rows of each group are kept. Memory: 24 bytes for each of at most
    2 × sum(limits) + a million rows, and 8 bytes a group. Equal priorities go to the smaller row.
    """

    def __init__(self, limits: npt.NDArray[Any]) -> None:
        self.limits: Int64 = np.asarray(limits, dtype=np.int64)
        if (self.limits < 0).any():
            raise PlanError("draw: a limit is negative")
        # Rows above a full group's largest kept priority cannot enter any more.
        self._bounds = np.where(self.limits > 0, np.uint64(2**64 - 1), np.uint64(0))
        self._parts: list[tuple[Int64, UInt64, Int64]] = []
        self._buffered = 0
        self._kept = 0

    def add(self, groups: npt.NDArray[Any], priorities: UInt64, rows: npt.NDArray[Any]) -> None:
        """Take a block: group of each row (a negative one is no group), its priority, and its row number."""
        groups = np.asarray(groups, dtype=np.int64)
        wanted = groups >= 0
        wanted &= self.limits[np.where(wanted, groups, 0)] > 0
        wanted &= priorities <= self._bounds[np.where(wanted, groups, 0)]
        self._take(groups[wanted], priorities[wanted], np.asarray(rows, dtype=np.int64)[wanted])

    def result(self) -> tuple[Int64, Int64]:
        """(groups int64[n], rows int64[n]), sorted by group, then priority, then row."""
        groups, _, rows = self.kept()
        return groups, rows

    def _take(self, groups: Int64, priorities: UInt64, rows: Int64) -> None:
        self._parts.append((groups, priorities, rows))
        self._buffered += len(rows)
        if self._buffered > 2 * self._kept + SPARE_ROWS:
            self.kept()

    def kept(self) -> tuple[Int64, UInt64, Int64]:
        """(groups int64[n], priorities uint64[n], rows int64[n]), as the result; another draw may `add` them."""
        if not self._parts:
            return np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.int64)
        groups, priorities, rows = (np.concatenate(columns) for columns in zip(*self._parts, strict=True))
        order = np.lexsort((rows, priorities, groups))
        groups, priorities, rows = groups[order], priorities[order], rows[order]
        place = ranks(groups)
        full = place == self.limits[groups] - 1
        self._bounds[groups[full]] = priorities[full]
        kept = place < self.limits[groups]
        part = groups[kept], priorities[kept], rows[kept]
        self._parts, self._buffered, self._kept = [part], len(part[0]), len(part[0])
        return part

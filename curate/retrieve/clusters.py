"""Choosing by cells: cluster-based retrieval for small seed sets, DataComp's image-based filter, and what was covered.

DINOv2 takes 10,000 images from every cell with more than 3 seed images and caps a set at 1 million (RECIPES section 2);
which of a cell's images, and which million, the paper leaves open: here both are seeded draws. DataComp keeps the cells
that are nearest to at least one seed image (RECIPES section 11). It refuses to take less
than one image of a cell.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.errors import PlanError
from curate.retrieve.draw import Smallest
from curate.vectors import Int64, UInt64, hashed


def seeded(seed_counts: Int64, more_than: int = 3) -> npt.NDArray[np.bool_]:
    """bool[n_cells]: cells with more than so many seed images. `more_than=0` is DataComp's image-based filter: a pool
    image is kept when its cell is True."""
    return np.asarray(seed_counts > more_than)


class ClusterRetrieval:
    """The pool images that one small seed set retrieves, from blocks of the pool in any order.

    Memory: 24 bytes for each of at most twice (chosen cells × `per_cell`) rows.
    """

    def __init__(self, chosen: npt.NDArray[np.bool_], per_cell: int = 10_000, cap: int = 1_000_000, seed: int = 0):
        """`chosen` bool[n_cells] from `seeded`; `per_cell` images from each, at most `cap` in all."""
        if per_cell < 1 or cap < 1:
            raise PlanError(f"clusters: per_cell is {per_cell} and cap {cap}; expected at least 1")
        self.chosen, self.cap, self.seed = chosen, cap, seed
        self._draw = Smallest(np.where(chosen, per_cell, 0))

    def add(self, cells: npt.NDArray[Any], rows: Int64, keys: UInt64) -> None:
        """Take a block of the pool: its cells int[n], row numbers int64[n] and keys uint64[n]."""
        self._draw.add(cells, hashed(keys, self.seed), rows)

    def result(self) -> "Retrieved":
        """What the set retrieves. Where the cap cuts, it cuts at random over all cells, not cell by cell."""
        _, rows = self._draw.result()
        kept = rows
        if len(rows) > self.cap:
            kept = rows[np.argsort(hashed(rows, self.seed, salt=1), kind="stable")[: self.cap]]
        return Retrieved(np.sort(kept), cells=int(self.chosen.sum()), before_cap=len(rows))


@dataclass(frozen=True, eq=False)
class Retrieved:
    """Rows int64[n], ascending; the chosen cells; and how many images there were before the cap, as in table 15."""

    rows: Int64
    cells: int
    before_cap: int


@dataclass(frozen=True)
class Diversity:
    """How widely a subset is spread. `covered`: cells with at least one image. `effective`: exp of the entropy of the
    images over the cells, the number of equally filled cells that would be as diverse (0 for an empty subset)."""

    images: int
    covered: int
    effective: float


def diversity(cell_counts: Int64) -> Diversity:
    """Facts of a subset from its images per cell, int64[n_cells]."""
    filled = cell_counts[cell_counts > 0].astype(np.float64)
    if not len(filled):
        return Diversity(0, 0, 0.0)
    share = filled / filled.sum()
    return Diversity(int(cell_counts.sum()), len(filled), float(np.exp(-(share * np.log(share)).sum())))

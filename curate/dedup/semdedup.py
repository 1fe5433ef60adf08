"""SemDeDup inside one k-means cell: which rows have an earlier-ranked row that is nearly the same.

The published algorithm (Abbas et al. 2023, arXiv 2303.09540, Algorithm A7): rank a cell's rows by their distance to the
centre, the farthest first where hard examples are to stay; M_j is the largest cosine of row j to an earlier row; row j
is redundant iff M_j > 1 - eps. It is one-sided: a redundant row still knocks out later ones, so this is not a grouping
by components. Written from the paper; nothing is taken from its repository.

Where the paper holds the n × n matrix of a cell, this holds one tile. It refuses to choose eps: the similarity comes
back too, and any eps can be applied to it afterwards.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from curate.dedup.cosine import BLOCK_ROWS
from curate.dedup.cosine_block import Block, FloatArray, IntArray, VectorArray
from curate.errors import PlanError

Keep = Literal["hard", "easy", "random"]


def rank_rows(nearness: FloatArray, keep: Keep = "hard", *, seed: int = 0) -> IntArray:
    """Order a cell's rows: those that come first stay.

    Args:
        nearness: float32[n], cosine of each row to the cell's centre.
        keep: `hard` puts the farthest from the centre first (published default), `easy` the nearest, `random` neither.
        seed: of the random order.

    Returns:
        int64[n]: rows, first to stay first; equal nearness by the lower row.

    Raises:
        PlanError: unknown `keep`.
    """
    if keep == "random":
        return np.random.default_rng(seed).permutation(len(nearness)).astype(np.int64)
    if keep not in ("hard", "easy"):
        raise PlanError(f"keep is {keep!r}; expected hard, easy or random")
    return np.argsort(nearness if keep == "hard" else -nearness, kind="stable").astype(np.int64)


def similarity_to_earlier(
    vectors: VectorArray, order: IntArray, eps: float, *, block_rows: int = BLOCK_ROWS, device: str | None = None
) -> tuple[npt.NDArray[np.bool_], FloatArray, IntArray]:
    """Find each row's most similar earlier row, and whether it makes the row redundant.

    Args:
        vectors: float16 or float32 [n, d], the rows of one cell.
        order: int64[n], a permutation, from `rank_rows`.
        eps: a row is redundant above cosine 1 - eps (strictly).
        block_rows: rows of a tile.
        device: torch device.

    Returns:
        (bool[n], float32[n], int64[n]) by row of `vectors`: redundant; cosine to the most similar earlier row, as
        `cosine` defines it, 0 where none is positive; that row, -1 where there is none. Rows within rounding of
        1 - eps are decided in float64; among earlier rows equally similar within rounding, any may be named.

    Raises:
        PlanError: wrong dtype, shape or setting.
    """
    if not 0 <= eps <= 1:
        raise PlanError(f"eps is {eps}; expected 0 … 1")
    if order.shape != (len(vectors),):
        raise PlanError(f"order has shape {order.shape}; expected [{len(vectors)}], one place per vector")
    block = Block(vectors, 1 - eps, device, cut=False)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    block.reorder(np.argsort(place[block.rows]))
    best, which = _most_similar(block, block_rows)
    rows = block.rows
    redundant = np.zeros(len(vectors), np.bool_)
    similarity = np.zeros(len(vectors), np.float32)
    earlier = np.full(len(vectors), -1, np.int64)
    has = np.flatnonzero(best > 0)
    similarity[rows[has]] = block.cosine(rows[which[has]], rows[has])
    earlier[rows[has]] = rows[which[has]]
    undecided = (np.abs(best - float(block.threshold)) <= 2 * block.rounding) & (similarity[rows] <= block.threshold)
    close = np.flatnonzero(undecided) if block.threshold < 1 else np.empty(0, np.int64)  # nothing is above 1
    for at in close[close > 0]:
        cosine = block.cosine(rows[:at], np.full(at, rows[at]))
        most = int(cosine.argmax())
        similarity[rows[at]], earlier[rows[at]] = max(cosine[most], 0), rows[most] if cosine[most] > 0 else -1
    redundant[rows] = similarity[rows] > block.threshold
    return redundant, similarity, earlier


def _most_similar(block: Block, size: int) -> tuple[FloatArray, IntArray]:
    """Return the largest float32 product of each row of the block with an earlier one (0 if none is positive)."""
    if size < 1:
        raise PlanError(f"block_rows is {size}; expected 1 or more")
    n = len(block)
    best = np.zeros(n, np.float32)
    which = np.full(n, -1, np.int64)
    for start in range(0, n, size):
        later = block.heads[start : start + size]
        for first in range(0, start + 1, size):
            product = block.heads[first : first + size] @ later.T
            if first == start:
                product = product.triu(1)
            value, row = (part.cpu().numpy() for part in torch.max(product, dim=0))
            better = value > best[start : start + size]
            best[start : start + size][better] = value[better]
            which[start : start + size][better] = row[better] + first
    return best, which

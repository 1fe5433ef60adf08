"""Which vector of a reference set a row reaches: on the device, exact. A file of its own because it loads torch."""

import numpy as np

from curate.dedup.cosine import first_equal
from curate.dedup.cosine_block import Block, FloatArray, IntArray, VectorArray
from curate.errors import PlanError

TILE_ROWS = 2_048


class NearestVectors:
    """References on the device, asked for each shard. Raises PlanError for vectors of another width or dtype."""

    def __init__(self, references: VectorArray, threshold: float, device: str | None = None) -> None:
        self._first = np.flatnonzero(first_equal(references) == np.arange(len(references)))
        self._block = Block(references[self._first], threshold, device, cut=False, strict=True)
        self._width = references.shape[1]

    def of(self, vectors: VectorArray) -> tuple[IntArray, FloatArray]:
        """The nearest reference above the threshold of each row: (int64[n], -1 where there is none; float32[n])."""
        if vectors.shape[1] != self._width:
            raise PlanError(f"references have {self._width} numbers each, the pool's vectors {vectors.shape[1]}")
        place, cosine = np.full(len(vectors), -1, np.int64), np.zeros(len(vectors), np.float32)
        if not len(self._block):
            return place, cosine
        different, inverse = np.unique(first_equal(vectors), return_inverse=True)
        for at in range(0, len(different), TILE_ROWS):
            rows = different[at : at + TILE_ROWS]
            asked = Block(vectors[rows], float(self._block.threshold), self._block.device.type, cut=False)
            self._tile(asked, rows, place, cosine)
        again = different[inverse.reshape(-1)]
        return place[again], cosine[again]

    def _tile(self, asked: Block, rows: IntArray, place: IntArray, cosine: FloatArray) -> None:
        block = self._block
        tiles = [slice(at, at + 8 * TILE_ROWS) for at in range(0, len(block), 8 * TILE_ROWS)]
        best = np.full(len(asked), -2, np.float32)
        for tile in tiles:
            if len(asked):
                np.maximum(best, (asked.heads @ block.heads[tile].T).amax(dim=1).cpu().numpy(), out=best)
        close = np.flatnonzero(best >= block.floor)
        for tile in tiles if len(close) else ():
            product = (asked.heads[close] @ block.heads[tile].T).cpu().numpy()
            floor = np.maximum(best[close] - 4 * block.rounding, block.floor)
            i, j = np.nonzero(product >= floor[:, None])
            mine, other = asked.rows[close[i]], block.rows[tile.start + j]
            exact = asked.cosine_to(mine, block, other)
            reached = exact > block.threshold
            for row, at, value in zip(rows[mine[reached]], self._first[other[reached]], exact[reached], strict=True):
                if place[row] < 0 or value > cosine[row] or (value == cosine[row] and at < place[row]):
                    place[row], cosine[row] = at, value

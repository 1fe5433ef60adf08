"""All pairs of vectors with a cosine at or above a threshold: exact on one block of rows.

The cosine of a pair is defined here once: dot product and norms in float64 over the values as given, rounded to
float32, compared in float32. Matrix products only propose: whatever could reach the threshold, given the rounding of a
float32 product of any shape, is recomputed by that definition. So the result depends neither on `block_rows` nor on
the device.

Zero, NaN and infinite vectors match nothing. It refuses to return a list of pairs beyond `memory_gb`: `edges_above`
joins the same components from at most N - 1 edges.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from curate.dedup.components import groups, spanning_forest
from curate.dedup.cosine_block import Block, FloatArray, IntArray, VectorArray
from curate.errors import PlanError

BLOCK_ROWS = 2_048  # a tile of 16 MB stays in the third-level cache between product and scan
BYTES_PER_PAIR = 72  # peak per pair while the list is sorted: tracemalloc saw 70
FULL_PRODUCT_SHARE = 0.002  # where the cut rows rule out less, one full product is cheaper than deciding each pair
LEADERS = 256  # rows compared with all others first, so that large groups are known before the tiles


def pairs_above(
    vectors: VectorArray, threshold: float, *,
    block_rows: int = BLOCK_ROWS, device: str | None = None, memory_gb: float = 4.0,
) -> tuple[IntArray, FloatArray]:  # fmt: skip
    """Find every pair of rows with cosine >= `threshold`.

    Args:
        vectors: float16 or float32 [N, d], of any length; they need not be normalised.
        threshold: inclusive, compared in float32.
        block_rows: rows of a tile of the product; 4 · block_rows² bytes are held beside the vectors.
        device: torch device, such as `cpu` or `cuda:0`; default: cuda where there is one.
        memory_gb: what the list of pairs may take while it is sorted.

    Returns:
        (int64[M, 2], float32[M]): rows i < j, ascending, and their cosine.

    Raises:
        PlanError: wrong dtype, shape or setting; or more pairs than `memory_gb` holds.
    """
    block = Block(vectors, threshold, device)
    limit = int(memory_gb * 1e9 / BYTES_PER_PAIR)
    pairs: list[IntArray] = []
    cosines: list[FloatArray] = []
    total = 0
    for left, right in _proposals(block, _spans(len(block), block_rows)):
        for pair, cosine in block.recheck(left, right):
            pairs.append(pair)
            cosines.append(cosine)
            total += len(pair)
            if total > limit:
                raise PlanError(
                    f"pairs_above: more than {limit:,} pairs reach {threshold}, beyond memory_gb={memory_gb:g}; use "
                    "edges_above, whose components are the same, or raise the threshold or memory_gb"
                )
    return _sorted(pairs, cosines, block.rows)


def edges_above(
    vectors: VectorArray, threshold: float, *,
    fresh: npt.NDArray[np.bool_] | None = None, block_rows: int = BLOCK_ROWS, device: str | None = None,
) -> tuple[IntArray, FloatArray]:  # fmt: skip
    """Find edges with the components of `pairs_above`, and at most N - 1 of them, however many pairs there are.

    Rows of equal bytes hang on their first one. Then the rows close to a few leaders are joined to them and laid side
    by side, and tiles whose rows are all connected already are passed over: half of all rows being one image, or
    nearly one, costs no memory and less time.

    Args:
        vectors: float16 or float32 [N, d].
        threshold: inclusive, as in `pairs_above`.
        fresh: bool[N]; pairs of rows that are not fresh are known, and are neither compared nor reported (but rows of
            equal bytes always are). Default: all are fresh.
        block_rows: rows of a tile.
        device: torch device.

    Returns:
        (int64[M, 2], float32[M]): true pairs i < j, ascending, with their cosine. Which ones are chosen may depend on
        `block_rows`; their components do not.

    Raises:
        PlanError: wrong dtype, shape or setting.
    """
    first = first_equal(vectors) if isinstance(vectors, np.ndarray) and vectors.ndim == 2 else None
    block = Block(vectors, threshold, device, only=first)
    forest = _Forest(block, np.ones(len(vectors), np.bool_) if fresh is None else fresh)
    if first is not None:
        copies = np.flatnonzero(first != np.arange(len(first)))
        forest.add(*_joined(list(block.recheck(first[copies], copies, given=True))))
    forest.lead()
    block.reorder(forest.order())
    known = int((~forest.fresh[block.rows]).sum())
    for left, right in _proposals(block, _open_spans(forest, block, known, block_rows)):
        for start in range(0, len(left), 1 << 16):
            i, j = left[start : start + (1 << 16)], right[start : start + (1 << 16)]
            labels = forest.label[block.rows]
            apart = labels[i] != labels[j]
            forest.add(*_joined(list(block.recheck(i[apart], j[apart]))))
    return forest.result()


def nearest_above(
    vectors: VectorArray, threshold: float, neighbours: int, *,
    fresh: npt.NDArray[np.bool_] | None = None, block_rows: int = BLOCK_ROWS, device: str | None = None,
) -> tuple[IntArray, FloatArray]:  # fmt: skip
    """Find the edges from each row to its nearest `neighbours` rows whose cosine is above `threshold` (strictly).

    DINOv2's self-deduplication (arXiv 2304.07193, App. A.3) with neighbours = 64 and threshold = 0.6, exact where the
    paper searched an approximate index. Equal cosines are ranked by the lower row.

    Args:
        vectors: float16 or float32 [N, d].
        threshold: exclusive.
        neighbours: edges that a row may propose; at most N · neighbours edges come back.
        fresh: bool[N]; pairs of rows that are not fresh are known, and are not compared: such a row proposes its
            nearest fresh ones. Default: all are fresh.
        block_rows: rows of a tile.
        device: torch device.

    Returns:
        (int64[M, 2], float32[M]): rows i < j, each pair once, ascending, and their cosine.

    Raises:
        PlanError: wrong dtype, shape or setting.
    """
    if neighbours < 1:
        raise PlanError(f"neighbours is {neighbours}; expected 1 or more")
    block = Block(vectors, threshold, device, strict=True)
    known = 0
    if fresh is not None:
        block.reorder(np.argsort(fresh[block.rows], kind="stable"))
        known = int((~fresh[block.rows]).sum())
    size = min(block_rows, max(1, (1 << 26) // max(1, len(block))))
    spans = [(start, stop, known) for start, stop in _spans_of(known, size)]
    spans += [(start + known, stop + known, 0) for start, stop in _spans_of(len(block) - known, size)]
    pairs: list[IntArray] = []
    cosines: list[FloatArray] = []
    for start, stop, first in spans:
        i, j, cosine = block.nearest(start, stop, first, neighbours)
        pairs.append(np.stack([np.minimum(i, j), np.maximum(i, j)], axis=1))
        cosines.append(cosine)
    found, cosine = _sorted(pairs, cosines, np.arange(len(vectors)))
    new = np.ones(len(found), np.bool_)
    new[1:] = (found[1:] != found[:-1]).any(axis=1)
    return found[new], cosine[new]


def cross_above(
    queries: VectorArray, vectors: VectorArray, threshold: float, *,
    block_rows: int = BLOCK_ROWS, device: str | None = None, memory_gb: float = 4.0,
) -> tuple[IntArray, FloatArray]:  # fmt: skip
    """Find every query (a reference set, a sample) and row with cosine >= `threshold`, as `pairs_above` defines it.

    Args:
        queries: float16 or float32 [Q, d]; held on the device.
        vectors: [N, d], of the same d; passed through the device in pieces.
        threshold: inclusive.
        block_rows: rows of a tile.
        device: torch device.
        memory_gb: what the list of pairs may take.

    Returns:
        (int64[M, 2], float32[M]): (query, row), ascending, and their cosine.

    Raises:
        PlanError: wrong dtype or shape, different d, or more pairs than `memory_gb` holds.
    """
    asked = Block(queries, threshold, device, cut=False)
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.shape[1] != queries.shape[1]:
        raise PlanError(
            f"cross_above: vectors are {np.shape(vectors)}; expected [N, {queries.shape[1]}] as the queries"
        )
    pairs: list[IntArray] = []
    cosines: list[FloatArray] = []
    total, limit = 0, int(memory_gb * 1e9 / BYTES_PER_PAIR)
    for start, stop in _spans_of(len(vectors), 8 * block_rows):
        block = Block(vectors[start:stop], threshold, device, cut=False)
        for first, last in _spans_of(len(asked), block_rows):
            if not len(block):
                continue
            product = asked.heads[first:last] @ block.heads.T
            having = (product.amax(dim=1) >= asked.floor).nonzero().flatten()
            hits = (product[having] >= asked.floor).nonzero()
            left, right = having[hits[:, 0]].cpu().numpy(), hits[:, 1].cpu().numpy()
            i, j = asked.rows[first + left], block.rows[right]
            cosine = asked.cosine_to(i, block, j)
            true = cosine >= asked.threshold
            pairs.append(np.stack([i[true], j[true] + start], axis=1))
            cosines.append(cosine[true])
            total += int(true.sum())
            if total > limit:
                raise PlanError(
                    f"cross_above: more than {limit:,} pairs reach {threshold}, beyond memory_gb={memory_gb:g}; "
                    "pass fewer vectors at a time, or raise the threshold or memory_gb"
                )
    return _sorted(pairs, cosines, np.arange(len(vectors)))


def _spans_of(n: int, size: int) -> list[tuple[int, int]]:
    if size < 1:
        raise PlanError(f"block_rows is {size}; expected 1 or more")
    return [(start, min(n, start + size)) for start in range(0, n, size)]


Tile = tuple[tuple[int, int], tuple[int, int]]


def _spans(n: int, size: int, known: int = 0) -> Iterator[Tile]:
    """Tiles that hold all pairs, but those among the first `known` rows."""
    old = _spans_of(known, size)
    new = [(start + known, stop + known) for start, stop in _spans_of(n - known, size)]
    for place, span in enumerate([*old, *new]):
        for other in new[max(0, place - len(old)) :]:
            yield span, other


def _open_spans(forest: "_Forest", block: Block, known: int, size: int) -> Iterator[Tile]:
    """Yield the tiles whose rows are not all connected yet."""
    for span, other in _spans(len(block), size, known):
        a = forest.label[block.rows[span[0] : span[1]]]
        b = forest.label[block.rows[other[0] : other[1]]]
        if a[0] != b[0] or (a != a[0]).any() or (b != b[0]).any():
            yield span, other


def _proposals(block: Block, tiles: Iterator[Tile]) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield pairs of rows of the block, each once, whose product does not rule them out."""
    buffer = block.heads.new_empty(0)
    for (start, stop), (other, end) in tiles:
        size = (stop - start, end - other)
        if buffer.numel() < size[0] * size[1]:
            buffer = torch.empty(size[0] * size[1], dtype=block.heads.dtype, device=block.device)
        product = buffer[: size[0] * size[1]].view(size)  # fresh memory for each tile took as long as the product
        torch.mm(block.heads[start:stop], block.heads[other:end].T, out=product)
        if other == start:
            product.fill_diagonal_(-4)
        having = (product.amax(dim=1) >= block.floor).nonzero().flatten()
        if not len(having):
            continue
        near = product[having] >= block.floor
        if block.is_cut and int(torch.count_nonzero(near)) > product.numel() * FULL_PRODUCT_SHARE:
            mine = block.rows[start:stop][having.cpu().numpy()]
            near &= block.unit(mine) @ block.unit(block.rows[other:end]).T >= block.full_floor
        hits = near.nonzero()
        left, right = having[hits[:, 0]].cpu().numpy() + start, hits[:, 1].cpu().numpy() + other
        if other == start:  # each pair once
            once = left < right
            left, right = left[once], right[once]
        yield left, right


def _sorted(pairs: list[IntArray], cosines: list[FloatArray], rows: IntArray) -> tuple[IntArray, FloatArray]:
    found, cosine = _joined(list(zip(pairs, cosines, strict=True)))
    n = int(rows.max()) + 1 if len(rows) else 1
    order = np.argsort(found[:, 0] * n + found[:, 1], kind="stable")
    return found[order], cosine[order]


def _joined(parts: list[tuple[IntArray, FloatArray]]) -> tuple[IntArray, FloatArray]:
    pairs = np.concatenate([np.empty((0, 2), np.int64), *[part[0] for part in parts]])
    return pairs, np.concatenate([np.empty(0, np.float32), *[part[1] for part in parts]])


def first_equal(vectors: VectorArray) -> IntArray:
    """Return, per row of an array [N, d], the first row that has the same bytes.

    Rows are grouped by a 64-bit checksum and compared with the first of their group: where two different rows share
    a checksum, the later one may be called the first of its kind. It is then compared like any other row.
    """
    data = np.ascontiguousarray(vectors)
    octets = data.view(np.uint8).reshape(len(data), -1) if data.size else np.zeros((len(data), 1), np.uint8)
    words = np.zeros((len(data), -(-octets.shape[1] // 8) * 8), np.uint8)
    words[:, : octets.shape[1]] = octets
    mixers = np.random.default_rng(0).integers(0, 1 << 63, words.shape[1] // 8, dtype=np.uint64) * 2 + 1
    parts = np.array_split(words, 1 + len(words) // 65536)
    codes = np.concatenate([(part.view(np.uint64) * mixers).sum(axis=1, dtype=np.uint64) for part in parts])
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    lowest = first[inverse.reshape(-1)]
    rows = np.arange(len(data))
    for start in range(0, len(data), 65536):
        part = slice(start, start + 65536)
        same = (octets[part] == octets[lowest[part]]).all(axis=1)
        lowest[part] = np.where(same, lowest[part], rows[part])
    return np.asarray(lowest, np.int64)


class _Forest:
    """Edges found so far, and which rows they connect. Of the given rows, those that are not fresh are known."""

    def __init__(self, block: Block, fresh: npt.NDArray[np.bool_]) -> None:
        self.block, self.fresh = block, fresh
        self.label: IntArray = np.arange(len(block.given), dtype=np.int64)
        self.pairs = np.empty((0, 2), np.int64)
        self.cosines = np.empty(0, np.float32)
        self.pending: list[tuple[IntArray, FloatArray]] = []
        self.waiting = 0

    def add(self, pairs: IntArray, cosines: FloatArray) -> None:
        """Add true edges; labels follow at once when there are many, since they spare work then."""
        if len(pairs):
            self.pending.append((pairs, cosines))
            self.waiting += len(pairs)
        if self.waiting > 8_192 + len(self.label) // 64:
            self.fold()

    def fold(self) -> None:
        """Reduce the edges to a spanning forest, and name the components."""
        pairs, cosines = _joined([(self.pairs, self.cosines), *self.pending])
        kept = spanning_forest(pairs, -cosines)
        self.pairs, self.cosines = pairs[kept], cosines[kept]
        self.pending, self.waiting = [], 0
        self.label = groups(len(self.label), self.pairs)

    def lead(self) -> None:
        """Join the rows near a few evenly spaced fresh leaders to them."""
        block = self.block
        new = np.flatnonzero(self.fresh[block.rows])
        if len(new) <= 4 * LEADERS:
            return
        leaders = new[:: len(new) // LEADERS]
        chosen = block.heads[torch.from_numpy(leaders).to(block.device)].T
        for start, stop in _spans_of(len(block), 1 << 14):
            nearest, at = (block.heads[start:stop] @ chosen).max(dim=1)
            has, which = (nearest >= block.floor).cpu().numpy(), leaders[at.cpu().numpy()]
            mine = np.arange(start, stop)
            has &= which != mine
            self.add(*_joined(list(block.recheck(mine[has], which[has]))))
        self.fold()

    def order(self) -> IntArray:
        """Order of the block's rows: known ones first, and connected ones side by side, the largest component first."""
        label = self.label[self.block.rows]
        size = np.bincount(label, minlength=len(self.label))[label]
        return np.lexsort((label, -size, self.fresh[self.block.rows]))

    def result(self) -> tuple[IntArray, FloatArray]:
        """Return the forest, ascending."""
        self.fold()
        return _sorted([self.pairs], [self.cosines], np.arange(len(self.label)))

"""Edges to groups: who is connected with whom, over one array or over a stream of them.

Near-duplicate search gives pairs; what is kept or dropped is decided per connected component. Everything here is
canonical: a group's name is its lowest member, so the answer is the same whatever the order, the chunks or the workers.
Memory is bounded by the nodes that have an edge, never by the size of the corpus.

It refuses to weigh edges against one another (only the spanning forest ranks them) and to choose which member is kept.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from curate.errors import PlanError

IntArray = npt.NDArray[np.int64]
IdArray = npt.NDArray[np.int64] | npt.NDArray[np.uint64] | npt.NDArray[np.bytes_]

# Edges held back before they are merged into the forest: 16 MB as int64. Merging costs O(nodes + edges), so the
# buffer also grows with the nodes, which keeps a stream of any length at O(edges · log).
BUFFER_EDGES = 1_000_000


def groups(n: int, pairs: IntArray) -> IntArray:
    """Name the connected component of each of `n` nodes by its lowest member.

    Args:
        n: number of nodes; they are 0 … n-1.
        pairs: int64[M, 2], undirected edges in any order, repeats and self-loops allowed.

    Returns:
        int64[n]: the lowest node that the node is connected with (itself where it has no edge).

    Raises:
        PlanError: `pairs` is not an integer array [M, 2], or names a node outside 0 … n-1.
    """
    edges = _edges(pairs)
    if n < 0:
        raise PlanError(f"groups: n is {n}; expected a number of nodes, 0 or more")
    lowest = np.arange(n, dtype=np.int64)
    if not len(edges):
        return lowest
    if edges.min() < 0 or edges.max() >= n:
        raise PlanError(f"groups: pairs name nodes {edges.min()} … {edges.max()}; expected 0 … {n - 1}")
    nodes, root = _components(edges)
    lowest[nodes] = nodes[root]
    return lowest


def stream_groups(chunks: Iterable[IdArray], *, buffer_edges: int = BUFFER_EDGES) -> tuple[IdArray, IdArray]:
    """Group a stream of edges between ids of any kind, holding only the nodes seen and one buffer.

    Args:
        chunks: arrays [M, 2] of one dtype: int64, uint64, or bytes such as `S16` (a 128-bit key as its 16 raw
            bytes; `S` compares like the raw bytes as long as all ids have the same length).
        buffer_edges: edges collected before they are merged; the buffer also grows with the nodes.

    Returns:
        (ids[K], lowest[K]): every id that has an edge, ascending, and the lowest id of its component.

    Raises:
        PlanError: a chunk is not [M, 2], or its dtype differs from the first chunk's.
    """
    kept: IdArray | None = None  # star edges of the forest so far
    buffer: list[IdArray] = []
    held = 0
    for chunk in chunks:
        if chunk.ndim != 2 or chunk.shape[1] != 2:
            raise PlanError(f"stream_groups: a chunk has shape {chunk.shape}; expected [M, 2]")
        first = kept if kept is not None else (buffer[0] if buffer else chunk)
        if chunk.dtype != first.dtype or chunk.dtype.kind not in "iuS":
            raise PlanError(f"stream_groups: a chunk is {chunk.dtype}; expected {first.dtype}, int64, uint64 or S16")
        buffer.append(chunk)
        held += len(chunk)
        if held >= max(buffer_edges, 0 if kept is None else len(kept)):
            kept = _star(buffer if kept is None else [kept, *buffer])
            buffer, held = [], 0
    if buffer or kept is None:
        kept = _star([*([] if kept is None else [kept]), *buffer])
    return kept[:, 0], kept[:, 1]


def spanning_forest(pairs: IntArray, weight: npt.NDArray[np.uint8] | npt.NDArray[np.float32]) -> IntArray:
    """Choose the edges of the one minimum spanning forest under the order (weight, i, j).

    That order is total, so the forest is unique, and the forest of a union is the forest of the forests: edges can be
    folded away chunk by chunk without changing the end.

    Args:
        pairs: int64[M, 2], i < j; of a pair that comes twice the lighter one counts.
        weight: [M], lower is preferred.

    Returns:
        int64[F]: rows of `pairs` that form the forest, ascending; F is at most the nodes with an edge, less one.
    """
    if not len(pairs):
        return np.empty(0, np.int64)
    order = np.lexsort((pairs[:, 1], pairs[:, 0], weight))
    nodes, flat = np.unique(pairs[order], return_inverse=True)
    ends = flat.reshape(-1, 2)
    lightest = np.sort(np.unique(ends[:, 0] * len(nodes) + ends[:, 1], return_index=True)[1])
    order, ends = order[lightest], ends[lightest]
    rank = np.arange(1, len(order) + 1, dtype=np.float64)  # exact to 2^53; 0 would mean "no edge" to scipy
    graph = coo_array((rank, (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes))).tocsr()
    chosen = minimum_spanning_tree(graph).data.astype(np.int64) - 1
    return np.sort(order[chosen])


def _edges(pairs: IntArray) -> IntArray:
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        raise PlanError(f"pairs are {pairs.dtype}{list(pairs.shape)}; expected int64[M, 2]")
    return pairs.astype(np.int64, copy=False)


def _components(edges: IdArray) -> tuple[IdArray, IntArray]:
    """Return the ids with an edge, ascending, and the position of the lowest id of each one's component."""
    nodes, flat = np.unique(edges, return_inverse=True)
    ends = flat.reshape(-1, 2)
    ones = np.ones(len(ends), np.bool_)  # repeated edges are added up: bool cannot overflow to "no edge"
    graph = coo_array((ones, (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
    count, label = connected_components(graph, directed=False)
    lowest = np.full(count, len(nodes), np.int64)
    np.minimum.at(lowest, label, np.arange(len(nodes)))
    return nodes, lowest[label]  # type: ignore[return-value]


def _star(chunks: list[IdArray]) -> IdArray:
    if not chunks:
        return np.empty((0, 2), np.int64)
    nodes, root = _components(np.concatenate(chunks))  # type: ignore[arg-type]
    star: IdArray = np.stack([nodes, nodes[root]], axis=1)  # type: ignore[assignment]
    return star

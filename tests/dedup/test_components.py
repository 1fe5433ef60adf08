"""Edges to groups: against a plain union-find, whatever the order and the chunks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.dedup.components import groups, spanning_forest, stream_groups
from curate.errors import PlanError

EDGES = st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40)


def _union_find(n: int, edges: list[tuple[int, int]]) -> list[int]:
    root = list(range(n))
    for a, b in edges:
        low, high = sorted((root[a], root[b]))
        root = [low if at == high else at for at in root]
    return root


def _array(edges: list[tuple[int, int]]) -> np.ndarray:
    return np.array(edges, np.int64).reshape(-1, 2)


@settings(max_examples=100, deadline=None)
@given(EDGES, st.randoms())
def test_groups_are_those_of_union_find_in_any_order(edges: list[tuple[int, int]], draw) -> None:  # type: ignore[no-untyped-def]
    """A group named by whichever edge came first."""
    expected = _union_find(30, edges)
    shuffled = [edge if draw.random() < 0.5 else edge[::-1] for edge in edges]
    draw.shuffle(shuffled)
    assert groups(30, _array(edges)).tolist() == expected
    assert groups(30, _array(shuffled)).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(EDGES, st.integers(1, 50), st.sampled_from(["int64", "uint64", "S16"]))
def test_a_stream_gives_the_same_groups_for_any_ids(edges: list[tuple[int, int]], buffer: int, dtype: str) -> None:
    """Components cut at a chunk, and 128-bit keys compared by fewer bits (they differ in the last byte only)."""
    names = np.arange(30, dtype=np.int64)
    if dtype == "S16":
        names = np.frombuffer(b"".join(b"\xff" * 14 + bytes([1 + at // 256, at % 256]) for at in range(30)), "S16")
    elif dtype == "uint64":
        names = names.astype(np.uint64) + np.uint64(2**63)
    chunks = [names[_array(edges[at : at + 7])] for at in range(0, len(edges), 7)]
    ids, lowest = stream_groups(iter(chunks), buffer_edges=buffer)
    expected = np.array(_union_find(30, edges))
    seen = np.unique(_array(edges))
    if len(seen):
        np.testing.assert_array_equal(ids, names[seen])
        np.testing.assert_array_equal(lowest, names[expected[seen]])
    else:
        assert len(ids) == len(lowest) == 0


def test_an_edge_that_comes_many_times_stays_an_edge() -> None:
    """Repeats are added up by the sparse matrix: 256 of them are 0 in a byte."""
    assert groups(3, np.repeat([[0, 2]], 512, axis=0)).tolist() == [0, 1, 0]


def test_a_long_chain_is_one_group() -> None:
    """Depth that recursion or label propagation pays for."""
    n = 200_000
    order = np.random.default_rng(0).permutation(n - 1)
    chain = np.stack([order, order + 1], axis=1)
    assert (groups(n, chain) == 0).all()


@settings(max_examples=60, deadline=None)
@given(EDGES, st.integers(0, 100))
def test_the_forest_is_the_same_when_it_is_built_in_parts(edges: list[tuple[int, int]], seed: int) -> None:
    """Edges folded chunk by chunk that end as another forest."""
    pairs = np.unique(np.sort(_array([e for e in edges if e[0] != e[1]]), axis=1), axis=0).reshape(-1, 2)
    weight = np.random.default_rng(seed).integers(0, 4, len(pairs)).astype(np.uint8)
    whole = spanning_forest(pairs, weight)
    half = len(pairs) // 2
    first, second = spanning_forest(pairs[:half], weight[:half]), half + spanning_forest(pairs[half:], weight[half:])
    parts = np.concatenate([first, second])
    again = parts[spanning_forest(pairs[parts], weight[parts])]
    np.testing.assert_array_equal(pairs[whole], pairs[again])
    np.testing.assert_array_equal(groups(30, pairs[whole]), groups(30, pairs))


@pytest.mark.parametrize(
    ("n", "pairs", "says"),
    [
        (3, np.array([[0, 3]]), "nodes 0 … 3; expected 0 … 2"),
        (3, np.array([[-1, 0]]), "expected 0 … 2"),
        (3, np.zeros(4, np.int64), "expected int64"),
        (3, np.zeros((2, 2)), "float64"),
    ],
)
def test_wrong_edges_are_named(n: int, pairs: np.ndarray, says: str) -> None:
    """A node outside the corpus that wraps round to a real one."""
    with pytest.raises(PlanError, match=says):
        groups(n, pairs)
    with pytest.raises(PlanError, match="expected"):
        stream_groups(iter([np.zeros((1, 2), np.int64), np.zeros((1, 2), np.uint64)]))

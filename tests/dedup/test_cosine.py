"""Vectors near in cosine: blocks against brute force, cells by measured recall, the published forms restated."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.dedup import cosine, cosine_block
from curate.dedup.cells import (
    assign_cells,
    keep_nearest,
    measure_recall,
    pairs_over_cells,
    train_cells,
)
from curate.dedup.components import groups
from curate.dedup.cosine import VectorArray, cross_above, edges_above, nearest_above, pairs_above
from curate.dedup.semdedup import rank_rows, similarity_to_earlier
from curate.errors import PlanError

torch.set_num_threads(1)  # small products: threads cost more than they give on a shared machine


def _vectors(seed: int, n: int, width: int, dtype: str = "float32") -> VectorArray:
    """Random vectors, a third of them near or equal copies; rows 3, 5, 7 zero, NaN, infinite."""
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((n, width))
    third = n // 3
    noise = draw.standard_normal((third, width)) * draw.choice([0, 0.01, 0.3, 0.5], (third, 1))
    vectors[draw.integers(0, n, third)] = vectors[draw.integers(0, n, third)] + noise
    if n > 9:
        vectors[3], vectors[5, 0], vectors[7, 0] = 0, np.nan, np.inf
    return vectors.astype(dtype)


def _cosines(vectors: VectorArray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    with np.errstate(all="ignore"):
        unit = wide / np.sqrt((wide * wide).sum(axis=1, keepdims=True))
        return np.nan_to_num((unit @ unit.T).astype(np.float32), nan=-2)


def _brute_force(vectors: VectorArray, threshold: float) -> np.ndarray:
    return np.argwhere(np.triu(_cosines(vectors) >= np.float32(threshold), 1))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9_999), st.integers(0, 90), st.integers(1, 70), st.sampled_from(["float16", "float32"]),
    st.sampled_from([-1.0, 0.0, 0.5, 0.9, 1.0]), st.integers(1, 120),
)  # fmt: skip
def test_pairs_are_those_of_brute_force(
    seed: int, n: int, width: int, dtype: str, threshold: float, block_rows: int
) -> None:
    """A pair lost at a tile's border, at the threshold, or through a row that has no direction."""
    vectors = _vectors(seed, n, width, dtype)
    pairs, similarity = pairs_above(vectors, threshold, block_rows=block_rows)
    assert pairs.dtype == np.int64 and similarity.dtype == np.float32
    np.testing.assert_array_equal(pairs, _brute_force(vectors, threshold))
    np.testing.assert_allclose(similarity, _cosines(vectors)[pairs[:, 0], pairs[:, 1]], atol=1e-6)
    edges, _ = edges_above(vectors, threshold, block_rows=block_rows)
    assert set(map(tuple, edges)) <= set(map(tuple, pairs)) and len(edges) < max(n, 1)
    np.testing.assert_array_equal(groups(n, edges), groups(n, pairs))


@pytest.mark.parametrize("length", [3e-43, 3e38])
def test_lengths_at_the_ends_of_float32(length: float) -> None:
    """Rows so short that 1 / length is infinite as float32, or so long that it is rounded: no copy of them found."""
    vectors = _vectors(3, 90, 16)
    vectors = (vectors / np.nanmax(np.abs(np.where(np.isfinite(vectors), vectors, 0))) * length).astype(np.float32)
    vectors.flags.writeable = False  # as a buffer read from a file: nothing warns of it
    want = _brute_force(vectors, 0.9)
    assert len(want) > 5
    np.testing.assert_array_equal(pairs_above(vectors, 0.9)[0], want)
    np.testing.assert_array_equal(groups(90, edges_above(vectors, 0.9)[0]), groups(90, want))


@pytest.mark.parametrize("width", [64, 200])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
@pytest.mark.parametrize("rounded", [False, True])
def test_rows_cut_short_lose_no_pair(
    monkeypatch: pytest.MonkeyPatch, width: int, threshold: float, rounded: bool
) -> None:
    """The bound from head and tail set too low by rounding, to bfloat16 above all; another result where it is fast."""
    monkeypatch.setattr(cosine_block, "multiplies_bfloat16", lambda device: rounded)
    monkeypatch.setattr(cosine_block, "MIN_ROWS_FOR_HEADS", 16)
    monkeypatch.setattr(cosine_block, "RECHECK_COST", 1)
    monkeypatch.setattr(cosine, "LEADERS", 8)
    vectors = _vectors(1, 400, width, "float16")
    assert (cosine_block.Block(vectors, threshold, "cpu").heads.dtype == torch.bfloat16) == rounded
    expected = _brute_force(vectors, threshold)
    one, similarity = pairs_above(vectors, threshold)
    other, same = pairs_above(vectors, threshold, block_rows=37)
    np.testing.assert_array_equal(one, expected)
    np.testing.assert_array_equal(other, expected)
    np.testing.assert_array_equal(similarity, same)
    edges, _ = edges_above(vectors, threshold, block_rows=50)
    np.testing.assert_array_equal(groups(400, edges), groups(400, expected))


def test_equal_rows_reach_one() -> None:
    """A threshold of 1 that rounding keeps equal vectors from."""
    vectors = np.random.default_rng(0).standard_normal((1, 300)).astype(np.float16).repeat(5, axis=0)
    pairs, similarity = pairs_above(vectors, 1.0)
    assert len(pairs) == 10 and (similarity == 1).all()


def test_too_many_pairs_are_refused_and_edges_are_not() -> None:
    """Half of all rows one image: 18 million pairs, and as many again nearly equal."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((6_000, 32)).astype(np.float32)
    vectors[::2] = vectors[0]
    vectors[1:2_000:2] = vectors[0] + 0.01 * draw.standard_normal((1_000, 32))
    with pytest.raises(PlanError, match=r"memory_gb=0\.01; use edges_above"):
        pairs_above(vectors, 0.9, memory_gb=0.01)
    edges, _ = edges_above(vectors, 0.9)
    group = groups(6_000, edges)
    assert (group[::2] == 0).all() and (group[1:2_000:2] == 0).all() and len(edges) < 6_000
    assert (group[2_001::2] == np.arange(2_001, 6_000, 2)).mean() > 0.99


def test_references_are_found() -> None:
    """A copy of an evaluation image that passes because it lies in another array."""
    vectors = _vectors(2, 200, 24)
    found, _ = cross_above(vectors[:50], vectors, 0.9, block_rows=16)
    expected = np.argwhere(_cosines(vectors)[:50] >= np.float32(0.9))
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9_999), st.integers(1, 8), st.integers(5, 60), st.sampled_from([None, 0.0, 1e-4, 0.2]))
def test_dinov2_form_is_the_published_one(seed: int, neighbours: int, block_rows: int, crowd: float | None) -> None:
    """k nearest neighbours, edges above 0.6, components (arXiv 2304.07193, App. A.3), restated over the full matrix; in
    a crowd, whose cosines are equal as float32, too."""
    vectors = _vectors(seed, 60, 8)
    if crowd is not None:
        noise = np.random.default_rng(seed).standard_normal((25, 8))
        vectors[12:60:2][:24], vectors[1] = vectors[10] + crowd * noise[1:], vectors[10]
        vectors = vectors.astype(np.float16)
    similarity = _cosines(vectors)
    np.fill_diagonal(similarity, -2)
    expected = set()
    for row in range(60):
        nearest = sorted(range(60), key=lambda other: (-similarity[row, other], other))[:neighbours]
        expected |= {(min(row, at), max(row, at)) for at in nearest if similarity[row, at] > np.float32(0.6)}
    pairs, _ = nearest_above(vectors, 0.6, neighbours, block_rows=block_rows)
    assert list(map(tuple, pairs.tolist())) == sorted(expected)
    fresh = np.random.default_rng(seed).random(60) < 0.3
    old, (known, similar) = np.flatnonzero(~fresh), nearest_above(vectors[~fresh], 0.6, neighbours)
    new = nearest_above(vectors, 0.6, neighbours, fresh=fresh, block_rows=block_rows)
    assert fresh[new[0]].any(axis=1).all()
    np.testing.assert_array_equal(keep_nearest([(old[known], similar), new], neighbours)[0], pairs)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9_999), st.sampled_from(["hard", "easy"]), st.sampled_from([0.01, 0.1, 0.5]))
def test_semdedup_form_is_the_published_one(seed: int, keep: str, eps: float) -> None:
    """Rank, upper triangle, largest cosine to an earlier row, remove above 1 - eps (arXiv 2303.09540), restated."""
    vectors = _vectors(seed, 50, 6)
    centre = np.ones((1, 6), np.float32) / np.sqrt(np.float32(6))
    nearness = assign_cells(vectors, centre, 1)[1][:, 0]
    order = rank_rows(nearness, keep)  # type: ignore[arg-type]
    ranked = _cosines(vectors)[order][:, order]
    largest = np.triu(np.maximum(ranked, 0), 1).max(axis=0)
    expected = np.empty(50, bool)
    expected[order] = largest > np.float32(1 - eps)
    redundant, similarity, earlier = similarity_to_earlier(vectors, order, eps, block_rows=7)
    np.testing.assert_array_equal(redundant, expected)
    np.testing.assert_allclose(similarity[order], largest, atol=1e-6)
    place = np.argsort(order)
    assert (place[earlier[redundant]] < place[redundant]).all()


def test_cells_find_planted_pairs_and_say_how_many() -> None:
    """A recall that is assumed: pairs that no shared cell holds, or a measure that counts what was not found."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((6_000, 64)).astype(np.float16)
    copies = draw.permutation(6_000).reshape(2, -1)[:, :300]
    vectors[copies[1]] = vectors[copies[0]] + 0.1 * draw.standard_normal((300, 64))
    centres = train_cells(vectors, 6_000, probes=4, rows_per_cell=1_000)
    assert len(centres) >= 20
    np.testing.assert_array_equal(centres, train_cells(vectors, 6_000, probes=4, rows_per_cell=1_000))
    pairs, _ = pairs_over_cells(vectors, centres, 0.9, probes=4)
    exact, _ = pairs_above(vectors, 0.9)
    found = set(map(tuple, pairs))
    assert len(found) == len(pairs) and found <= set(map(tuple, exact))
    recall = measure_recall(vectors, 0.9, pairs, rows=6_000)
    assert recall.true == len(exact) and recall.found == len(pairs) and recall.rate >= 0.98
    assert 0 < recall.lower < recall.rate


@pytest.mark.parametrize("probes", [1, 3])
def test_cells_equally_near_in_float32_are_told_apart(probes: int) -> None:
    """Rows in one cell on a GPU and in another on a CPU, whose sums are rounded in another order."""
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((6, 200)).repeat(4, axis=0).astype(np.float32)
    centres += 1e-6 * draw.standard_normal(centres.shape).astype(np.float32)
    vectors = (centres[draw.integers(0, 24, 300)] + 0.1 * draw.standard_normal((300, 200))).astype(np.float16)
    wide = vectors.astype(np.float64)
    nearest = np.argsort(-(wide @ centres.astype(np.float64).T), axis=1)[:, :probes]
    np.testing.assert_array_equal(np.sort(assign_cells(vectors, centres, probes)[0]), np.sort(nearest))


def test_a_cell_that_would_hold_too_many_is_split() -> None:
    """One dense region in one cell that memory cannot hold."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((5_000, 32)).astype(np.float32)
    vectors[:3_000] = vectors[:1] + 0.5 * draw.standard_normal((3_000, 32))
    centres = train_cells(vectors, 5_000, probes=1, rows_per_cell=250)
    held = np.bincount(assign_cells(vectors, centres, 1)[0].ravel())
    assert held.max() <= 1_000


@pytest.mark.parametrize(
    ("vectors", "threshold", "says"),
    [
        (np.zeros((2, 3)), 0.9, r"float64\[2, 3\]; expected float16 or float32"),
        (np.zeros(3, np.float32), 0.9, "expected float16 or float32"),
        (np.zeros((2, 3), np.float32), 1.5, "threshold is 1.5"),
        (np.zeros((2, 3), np.float32), float("nan"), "threshold is nan"),
    ],
)
def test_wrong_input_is_named(vectors: VectorArray, threshold: float, says: str) -> None:
    """Float64 that is halved in silence; a similarity above 1 that nothing reaches."""
    with pytest.raises(PlanError, match=says):
        pairs_above(vectors, threshold)
    with pytest.raises(PlanError, match="block_rows"):
        pairs_above(np.ones((2, 3), np.float32), 0.5, block_rows=0)

"""Cells: assignment against brute force in float64, whatever the blocks, and k-means that finds what was planted."""

from typing import Literal

import numpy as np
import pytest

from curate.errors import PlanError
from curate.retrieve import cells as kernels
from curate.retrieve.cells import Cells, assign, nearest, plus_plus, train

RNG = np.random.default_rng(0)
CENTRES = RNG.standard_normal((50, 24))
POINTS = (CENTRES[RNG.integers(0, 50, 4000)] + 0.4 * RNG.standard_normal((4000, 24))).astype(np.float16)
POINTS[[7, 8, 9]] = [[0.0], [np.nan], [np.inf]]
BAD = np.array([7, 8, 9])


def brute(cells: Cells, points: np.ndarray) -> np.ndarray:
    """Every cell's exact score for every point, larger is nearer."""
    centroids, points = cells.centroids.astype(np.float64), points.astype(np.float64)
    with np.errstate(invalid="ignore"):
        products = points @ centroids.T
        return products - (centroids**2).sum(axis=1) / 2 if cells.metric == "l2" else products


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_assignment_equals_brute_force_for_any_block(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards exactness and determinism, with more centroids than one tile holds."""
    monkeypatch.setattr(kernels, "TILE_COLUMNS", 32)
    trained = train(POINTS, 80, "cosine" if metric == "cosine" else "l2", iterations=5)
    cells = Cells(trained.centroids, metric)
    members, away = next(assign(cells, [POINTS]))
    for step in (1, 13, 1000):
        parts = list(assign(cells, (POINTS[start : start + step] for start in range(0, 300, step))))
        assert np.array_equal(np.concatenate([part[0] for part in parts])[:300], members[:300])
        assert np.array_equal(np.concatenate([part[1] for part in parts])[:300], away[:300], equal_nan=True)
    good = np.setdiff1d(np.arange(4000), BAD)
    assert (members[BAD] == -1).all() and np.isnan(away[BAD]).all()
    assert np.array_equal(brute(cells, POINTS)[good].argmax(axis=1), members[good])
    own = cells.centroids[members[good]].astype(np.float64)
    points = POINTS[good].astype(np.float64)
    cosine = (points * own).sum(axis=1) / np.linalg.norm(points, axis=1) / np.linalg.norm(own, axis=1)
    expected = {
        "cosine": 1 - cosine,
        "l2": np.linalg.norm(points - own, axis=1),
        "ip": -(points * own).sum(axis=1),
    }[metric]
    assert np.allclose(away[good], expected, atol=1e-6)


def test_near_ties_go_to_the_smaller_number() -> None:
    """Guards the settling in float64: equal centroids, and centroids that float32 products cannot tell apart."""
    one = np.zeros((1, 24), np.float32)
    one[0, :3] = [0.6, 0.8, 1e-4]
    cells = Cells(np.concatenate([one * (1 - 1e-7), one, one, -one, one]), "ip")
    points = np.repeat(one, 600, axis=0).astype(np.float16)
    members, _ = next(assign(cells, [points]))
    assert set(members.tolist()) == {int(brute(cells, points[:1]).argmax())} == {1}
    assert np.array_equal(np.sort(nearest(cells, points[:5], 4), axis=1), np.tile([0, 1, 2, 4], (5, 1)))


def test_nearest_cells_are_exact_and_padded() -> None:
    """Guards nprobe: the probed set equals brute force, and asking for more cells than there are pads with -1."""
    cells = train(POINTS, 40, iterations=3)
    scores = brute(cells, POINTS[:200])
    found = nearest(cells, POINTS[:200], 8)
    for row in np.setdiff1d(np.arange(200), BAD):
        assert set(found[row].tolist()) == set(np.argsort(-scores[row])[:8].tolist())
    wide = nearest(cells, POINTS[:10], 45)
    assert (np.sort(wide[0])[5:] == np.arange(40)).all() and (wide[0][40:] == -1).all() and (wide[7] == -1).all()


def test_training_is_seeded_and_finds_planted_clusters() -> None:
    """Guards seeding: k-means++ and Lloyd find clusters that were planted, twice the same, and not for another seed."""
    first, again, other = (train(POINTS, 50, "l2", iterations=10, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.centroids, again.centroids) and not np.array_equal(first.centroids, other.centroids)
    planted = float((next(assign(Cells(CENTRES.astype(np.float32), "l2"), [POINTS]))[1][10:] ** 2).mean())
    assert float((next(assign(first, [POINTS]))[1][10:] ** 2).mean()) < 1.3 * planted
    lengths = np.linalg.norm(train(POINTS, 50, "cosine", iterations=3).centroids, axis=1)
    assert np.allclose(lengths, 1, atol=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_mini_batches_move_centroids_to_the_mean_of_what_they_were_given(metric: Literal["cosine", "l2"]) -> None:
    """Guards algorithm 1 of Sculley 2010, restated point by point; and unusable rows, which no batch holds."""
    found = train(POINTS, 30, metric, "random", iterations=2, seed=4, batch=700).centroids
    some = POINTS[np.setdiff1d(np.arange(len(POINTS)), BAD)].astype(np.float64)
    if metric == "cosine":
        some /= np.linalg.norm(some, axis=1, keepdims=True)
    rng = np.random.default_rng(4)
    centres = some[rng.choice(len(some), 30, replace=False)]
    given = np.zeros(30)
    for _ in range(2):
        order = rng.permutation(len(some))
        for start in range(0, len(order), 700):
            batch, held = some[order[start : start + 700]], centres.copy()
            if metric == "cosine":
                held /= np.linalg.norm(held, axis=1, keepdims=True)
            nearest_of = ((batch[:, None] - held[None]) ** 2).sum(axis=2).argmin(axis=1)
            for point, cell in zip(batch, nearest_of, strict=True):
                given[cell] += 1
                centres[cell] += (point - centres[cell]) / given[cell]
    if metric == "cosine":
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    assert np.allclose(found, centres, atol=1e-4)
    again = train(POINTS, 30, metric, "random", iterations=2, seed=4, batch=700).centroids
    assert np.array_equal(found, again)


def test_plus_plus_has_the_published_distribution() -> None:
    """Guards the rounds of rejection: the second centre is drawn in proportion to the squared distance to the first."""
    points = np.array([[0.0], [1.0], [2.0], [4.0]], dtype=np.float32)
    counted, expected = np.zeros((4, 4)), np.zeros((4, 4))
    for seed in range(3000):
        first, second = plus_plus(points, 2, np.random.default_rng(seed))
        counted[first, second] += 1 / 3000
    for first in range(4):
        squared = ((points - points[first]) ** 2).sum(axis=1)
        expected[first] = squared / squared.sum() / 4
    assert abs(counted - expected).max() < 0.03


def test_plus_plus_spreads_and_survives_copies() -> None:
    """Guards degenerate pools: fewer different points than cells still gives that many different rows."""
    points = np.repeat(np.eye(3, dtype=np.float32), 20, axis=0)
    rows = plus_plus(points, 10, np.random.default_rng(0))
    assert len(np.unique(rows)) == 10 and len(np.unique(points[rows[:3]], axis=0)) == 3


def test_too_few_points_and_foreign_settings_are_refused() -> None:
    """Guards against FAISS's own failure deep in a worker."""
    with pytest.raises(PlanError, match="lower the number of cells"):
        train(POINTS[7:20], 11)
    with pytest.raises(PlanError, match="kmeans"):
        train(POINTS, 5, init="best")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="finite"):
        Cells(np.full((2, 2), np.nan, np.float32))

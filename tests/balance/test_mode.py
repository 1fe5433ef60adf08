"""MoDE: balance, near-optimal assignment, and experts that do not depend on blocks."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from curate.balance.mode import assign, balanced_assignment, balanced_kmeans, train, unit
from curate.errors import PlanError

RNG = np.random.default_rng(0)
CENTRES = RNG.standard_normal((24, 16))
FEATURES = (CENTRES[RNG.zipf(1.6, 1500) % 24] + 0.3 * RNG.standard_normal((1500, 16))).astype(np.float16)
FEATURES[[3, 4]] = [[0.0], [np.nan]]


@pytest.mark.parametrize(("points", "cells"), [(60, 5), (200, 16), (64, 64), (7, 3), (5, 1), (0, 4), (3, 8)])
def test_assignment_is_balanced_and_nearly_optimal(points: int, cells: int) -> None:
    """Guards the auction: no cell beyond its capacity, and a sum within n · ε of the best that there is."""
    scores = RNG.standard_normal((points, cells))
    capacity = -(-points // cells)
    members = balanced_assignment(scores, capacity, step=1e-4)
    assert np.bincount(members, minlength=cells).max(initial=0) <= capacity and (members >= 0).all()
    if points:
        rows, columns = linear_sum_assignment(-np.repeat(scores, capacity, axis=1))
        best = scores[rows, columns // capacity].sum()
        assert scores[np.arange(points), members].sum() >= best - points * 1e-4 - 1e-9


def test_equal_scores_end() -> None:
    """Guards termination: copies of one caption, all cells alike."""
    members = balanced_assignment(np.zeros((90, 9)), 10)
    assert np.bincount(members).tolist() == [10] * 9
    with pytest.raises(PlanError, match="do not fit"):
        balanced_assignment(np.zeros((5, 2)), 2)


def test_experts_are_balanced_seeded_and_cover_every_fine_cell() -> None:
    """Guards the two levels: n experts of equally many fine cells, the same for the same seed."""
    one, again, other = (train(FEATURES, 24, 4, 8, 8, seed) for seed in (1, 1, 2))
    assert np.bincount(one.expert_of_fine).tolist() == [6] * 4
    assert np.array_equal(one.fine, again.fine) and np.array_equal(one.expert_of_fine, again.expert_of_fine)
    assert not np.array_equal(one.fine, other.fine)


def test_captions_go_to_the_nearest_fine_centre_for_any_block() -> None:
    """Guards assignment: brute force in float64, unusable features to -1, blocks of any size."""
    experts = train(FEATURES, 24, 4, 5, 5, seed=1)
    fine, expert = next(assign(experts, [FEATURES]))
    for step in (1, 113):
        parts = list(assign(experts, (FEATURES[s : s + step] for s in range(0, 1500, step))))
        assert np.array_equal(np.concatenate([part[0] for part in parts]), fine)
        assert np.array_equal(np.concatenate([part[1] for part in parts]), expert)
    units, good = unit(FEATURES)
    assert np.flatnonzero(~good).tolist() == [3, 4] == np.flatnonzero(fine == -1).tolist()
    gaps = ((units[:, None].astype(np.float64) - experts.fine[None]) ** 2).sum(axis=2)
    assert np.array_equal(gaps.argmin(axis=1)[good], fine[good])
    assert np.array_equal(expert[good], experts.expert_of_fine[fine[good]])
    assert next(assign(experts, [FEATURES[:0]]))[0].shape == (0,)


def test_cells_are_balanced_where_k_means_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the purpose: of concepts with sizes like 1 : 100, no training cell gets more than its share."""
    monkeypatch.setattr("curate.balance.mode.ROWS_PER_BATCH", 400)
    units = unit(FEATURES)[0][10:]
    centres = balanced_kmeans(units, 8, 10, seed=0)
    scores = units @ centres.T - (centres**2).sum(axis=1) / 2
    free = np.bincount(scores.argmax(axis=1), minlength=8)
    held = np.bincount(balanced_assignment(scores, -(-len(units) // 8)), minlength=8)
    assert held.max() - held.min() <= 8 and free.max() < 4 * len(units) / 8
    with pytest.raises(PlanError, match="lower the number"):
        balanced_kmeans(units[:5], 6, 1, seed=0)

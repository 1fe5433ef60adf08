"""Cluster-based retrieval against a plain restatement of DINOv2's rule, and the facts of a subset."""

import math

import numpy as np
import pytest

from curate.errors import PlanError
from curate.retrieve.clusters import ClusterRetrieval, diversity, seeded
from curate.retrieve.draw import Smallest, ordered
from curate.vectors import hashed, key_numbers


def pool(n: int = 5000, cells: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(-1, cells, n), np.arange(n), rng.integers(0, 2**63, n).astype(np.uint64)


@pytest.mark.parametrize(("per_cell", "cap"), [(10_000, 1_000_000), (30, 1_000_000), (30, 250)])
def test_counts_are_those_of_the_rule(per_cell: int, cap: int) -> None:
    """Guards table 15's counts: min(size, M) from each cell with more than 3 seeds, cut at the cap."""
    cells, rows, keys = pool()
    seeds = np.random.default_rng(1).integers(0, 40, 130)
    chosen = [cell for cell in range(40) if sum(1 for seed in seeds if seed == cell) > 3]
    before = sum(min(per_cell, sum(1 for cell in cells if cell == mine)) for mine in chosen)
    work = ClusterRetrieval(seeded(np.bincount(seeds, minlength=40)), per_cell, cap, seed=2)
    work.add(cells, rows, keys)
    found = work.result()
    assert (found.cells, found.before_cap, len(found.rows)) == (len(chosen), before, min(before, cap))
    assert len(np.unique(found.rows)) == len(found.rows) and set(cells[found.rows].tolist()) <= set(chosen)


def test_blocks_do_not_change_the_rows() -> None:
    """Guards determinism: blocks of 13 rows, the last first, give what one block gives."""
    cells, rows, keys = pool()
    chosen = seeded(np.bincount(cells[cells >= 0], minlength=40), more_than=100)

    def run(step: int) -> np.ndarray:
        work = ClusterRetrieval(chosen, 25, 300, seed=3)
        for start in range(0, len(rows), step)[::-1]:
            block = slice(start, start + step)
            work.add(cells[block], rows[block], keys[block])
        return work.result().rows

    assert np.array_equal(run(5000), run(13))
    other = ClusterRetrieval(chosen, 25, 300, seed=4)
    other.add(cells, rows, keys)
    assert not np.array_equal(run(5000), other.result().rows)


def test_datacomp_keeps_cells_with_any_seed() -> None:
    """Guards the image-based filter: a single seed image is enough there, and a cell without one is never kept."""
    assert seeded(np.array([0, 2, 0, 1]), more_than=0).tolist() == [False, True, False, True]
    with pytest.raises(PlanError, match="at least 1"):
        ClusterRetrieval(np.ones(3, bool), per_cell=0)


def test_smallest_equals_a_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the bounded buffer: ties, groups with limit 0, and a buffer that is cut many times."""
    monkeypatch.setattr("curate.retrieve.draw.SPARE_ROWS", 10)
    rng = np.random.default_rng(5)
    groups, marks = rng.integers(-1, 6, 2000), rng.integers(0, 50, 2000).astype(np.uint64)
    limits = np.array([0, 1, 5, 40, 1000, 7])
    draw = Smallest(limits)
    for start in range(0, 2000, 17):
        rows = np.arange(start, min(start + 17, 2000))
        draw.add(groups[rows], marks[rows], rows)
    expected = []
    for group, limit in enumerate(limits):
        mine = sorted((int(marks[row]), row) for row in range(2000) if groups[row] == group)
        expected += [(group, row) for _, row in mine[:limit]]
    assert [tuple(pair) for pair in np.stack(draw.result(), axis=1).tolist()] == expected


def test_hashes_are_even_and_seeded() -> None:
    """Guards draws over keys that differ in few bits: consecutive numbers must spread over the whole range."""
    drawn = hashed(np.arange(20_000), seed=0) / 2.0**64
    assert abs(drawn.mean() - 0.5) < 0.01 and abs(np.histogram(drawn, 20)[0] / 1000 - 1).max() < 0.15
    assert abs(np.corrcoef(drawn, hashed(np.arange(20_000), seed=1) / 2.0**64)[0, 1]) < 0.03
    assert key_numbers(["00000000000000ff" + "0" * 16, "f" * 32]).tolist() == [255, 2**64 - 1]


def test_distances_keep_their_order_as_numbers() -> None:
    """Guards "closest": -0.0 and 0.0 are equal, NaN is last, a negative distance is a caller's mistake."""
    marks = ordered(np.array([0.5, 0.0, -0.0, np.nan, np.inf, 1e-30]))
    assert marks[1] == marks[2] and np.argsort(marks, kind="stable").tolist() == [1, 2, 5, 0, 4, 3]
    with pytest.raises(PlanError, match="negative"):
        ordered(np.array([-1.0]))


def test_diversity_is_that_of_the_entropy() -> None:
    """Guards the report's facts: n equal cells count n, one cell counts 1, nothing counts 0."""
    assert diversity(np.array([5, 5, 0, 5])).effective == pytest.approx(3)
    assert diversity(np.array([7, 0])) == diversity(np.array([7]))
    uneven = diversity(np.array([3, 1]))
    assert uneven.effective == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert diversity(np.zeros(3, np.int64)).covered == 0

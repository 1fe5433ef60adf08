"""Search against brute force in float64: the same rows whatever blocks, workers and ties."""

import numpy as np
import pytest

from curate.errors import PlanError
from curate.retrieve.cells import assign, nearest, train
from curate.retrieve.search import Codes, Neighbours, by_cell, exact, merged, recall, reranked, search, watched

RNG = np.random.default_rng(0)
CENTRES = RNG.standard_normal((40, 32))
POOL = (CENTRES[RNG.integers(0, 40, 3000)] + 0.5 * RNG.standard_normal((3000, 32))).astype(np.float16)
POOL[200:350] = POOL[5]  # 150 copies of one image, as "image not found" has thousands
POOL[350] = POOL[5] * np.float16(2)  # and one with the same cosine
POOL[[11, 12]] = [[0.0], [np.nan]]
SEEDS = np.concatenate([POOL[5:8], (POOL[RNG.integers(400, 3000, 60)] * 1.1 + 0.1).astype(np.float16)])
SEEDS[4] = np.nan
ROWS = np.arange(3000) + 10_000  # row numbers are not positions
CELLS = train(POOL, 30, iterations=4)
MEMBERS = next(assign(CELLS, [POOL]))[0]
PROBES = nearest(CELLS, SEEDS, 5)


def brute(k: int, probes: np.ndarray | None) -> np.ndarray:
    """Rows by (similarity, row) among the probed cells, one seed at a time; -1 where there are fewer than k."""
    table = np.full((len(SEEDS), k), -1)
    pool = POOL.astype(np.float64)
    for i, seed in enumerate(SEEDS.astype(np.float64)):
        if not np.isfinite(seed).all():
            continue
        there = MEMBERS >= 0 if probes is None else np.isin(MEMBERS, probes[i]) & (MEMBERS >= 0)
        mine = np.flatnonzero(there)
        products = np.multiply(pool[mine], seed).sum(axis=1)
        lengths = np.sqrt(np.multiply(pool[mine], pool[mine]).sum(axis=1)) * np.sqrt((seed * seed).sum())
        best = mine[np.lexsort((mine, -(products / lengths)))][:k]
        table[i, : len(best)] = ROWS[best]
    return table


@pytest.mark.parametrize("k", [1, 4, 200, 4000])
def test_search_equals_brute_force(k: int) -> None:
    """Guards exactness within the probed cells, with 150 equal vectors at the border of k and k beyond the pool."""
    found = search(SEEDS, PROBES, by_cell(MEMBERS, ROWS, POOL), k)
    assert np.array_equal(found.rows, brute(k, PROBES))
    assert np.array_equal(np.isnan(found.similarity), found.rows == -1) and (found.rows[4] == -1).all()
    assert np.array_equal(exact(SEEDS, [(0, ROWS, POOL)], k).rows, brute(k, None))


def test_blocks_and_workers_do_not_change_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards determinism: small tiles, a cell in several blocks, backwards, and three workers merged."""
    whole = search(SEEDS, PROBES, by_cell(MEMBERS, ROWS, POOL), 6)
    monkeypatch.setattr("curate.retrieve.search.SCORES_PER_TILE", {"cpu": 1000})
    monkeypatch.setattr("curate.retrieve.search.CANDIDATES_BEFORE_CUT", 50)
    blocks = [
        (cell, rows[start : start + 40], vectors[start : start + 40])
        for cell, rows, vectors in by_cell(MEMBERS, ROWS, POOL)
        for start in range(0, len(rows), 40)
    ][::-1]
    parts = [search(SEEDS, PROBES, blocks[worker::3], 6) for worker in range(3)]
    for other in (search(SEEDS, PROBES, blocks, 6), merged(parts, 6)):
        assert np.array_equal(whole.rows, other.rows)
        assert np.array_equal(whole.similarity, other.similarity, equal_nan=True)


def test_codes_with_reranking_come_close_to_exact() -> None:
    """Guards the compressed way: searching 8-bit and PQ codes for more, then scoring the float16 vectors."""
    truth = exact(SEEDS, by_cell(MEMBERS, ROWS, POOL), 4)
    for codec, least in (("SQ8", 0.98), ("PQ16x4", 0.6)):
        codes = Codes.unpacked(Codes.trained(POOL[:1000], codec).packed())
        packed = [(cell, rows, codes.encode(vectors)) for cell, rows, vectors in by_cell(MEMBERS, ROWS, POOL)]
        assert packed[0][2].shape[1] == {"SQ8": 32, "PQ16x4": 8}[codec]
        rough = search(SEEDS, None, ((cell, rows, codes.decode(codes_)) for cell, rows, codes_ in packed), 200)
        found = reranked(SEEDS, rough, lambda rows: POOL[rows - 10_000], 4, seeds_per_pass=10)
        assert recall(found, truth) >= least
        good = found.rows >= 0
        same = (found.rows == truth.rows) & good
        assert np.array_equal(found.similarity[same], truth.similarity[same])
    with pytest.raises(PlanError, match="XYZ"):
        Codes.trained(POOL, "XYZ")


def test_recall_counts_true_neighbours() -> None:
    """Guards the figure that every run prints; -1 is neither a truth nor a hit."""
    truth = Neighbours(np.array([[1, 2], [3, -1], [-1, -1]]), np.zeros((3, 2)))
    found = Neighbours(np.array([[2, 9], [-1, 3], [-1, -1]]), np.zeros((3, 2)))
    assert recall(found, truth) == pytest.approx(2 / 3)
    assert recall(search(SEEDS, PROBES, by_cell(MEMBERS, ROWS, POOL), 4), exact(SEEDS, [(0, ROWS, POOL)], 4)) > 0.9
    assert 4 not in watched(SEEDS, 62, seed=0) and len(watched(SEEDS, 10, seed=0)) == 10


def test_nothing_to_find() -> None:
    """Guards the edges: no seeds, no blocks, only unusable vectors, k below 1."""
    assert search(SEEDS, PROBES, [], 3).rows.tolist() == [[-1] * 3] * len(SEEDS)
    assert search(SEEDS[:0], PROBES[:0], by_cell(MEMBERS, ROWS, POOL), 3).rows.shape == (0, 3)
    assert (exact(SEEDS, [(0, ROWS[11:13], POOL[11:13])], 2).rows == -1).all()
    assert list(by_cell(MEMBERS[:0], ROWS[:0], POOL[:0])) == []
    with pytest.raises(PlanError, match="at least 1"):
        search(SEEDS, PROBES, [], 0)

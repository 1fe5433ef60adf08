"""Quotas, balanced sampling and hierarchical k-means against naive restatements of Vo et al. 2024."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import PlanError
from curate.retrieve import hierarchy
from curate.retrieve.hierarchy import Tree, allocate, balanced, quotas


def level_of(sizes: list[int], target: int, multiplier: int) -> int:
    """The largest x with sum(min(x, size * m)) <= target, counted up one by one."""
    x = 0
    while x < target and sum(min(x + 1, size * multiplier) for size in sizes) <= target:
        x += 1
    return x


def assert_published(shares: np.ndarray, sizes: list[int], target: int, multiplier: int) -> None:
    total = sum(size * multiplier for size in sizes)
    assert shares.dtype == np.int64 and len(shares) == len(sizes)
    assert int(shares.sum()) == min(target, total)
    if total <= target:
        assert shares.tolist() == [size * multiplier for size in sizes]
        return
    x = level_of(sizes, target, multiplier)
    extra = shares - np.minimum(x, np.array(sizes, dtype=np.int64) * multiplier)
    assert set(extra.tolist()) <= {0, 1}
    assert all(size * multiplier > x for size, more in zip(sizes, extra, strict=True) if more)


def test_quotas_equal_the_published_search_on_200_random_vectors() -> None:
    """Guards the level x and the remainder: any other rounding shifts millions of images between concepts."""
    rng = np.random.default_rng(0)
    for case in range(200):
        sizes = (
            rng.integers(0, 40, rng.integers(1, 30)) if case % 2 else rng.zipf(1.4, rng.integers(1, 30)).clip(max=500)
        )
        target, multiplier = int(rng.integers(0, sizes.sum() + 5)), int(rng.integers(1, 4))
        assert_published(quotas(sizes, target, multiplier, seed=case), sizes.tolist(), target, multiplier)


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(0, 200), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_quotas_hold_for_any_sizes(sizes: list[int], target: int, multiplier: int, seed: int) -> None:
    """Guards the edges: no clusters, empty clusters, target 0, target beyond the pool."""
    assert_published(quotas(np.array(sizes, np.int64), target, multiplier, seed), sizes, target, multiplier)


def test_remainder_is_a_seeded_draw() -> None:
    """Guards against a remainder that always goes to the first clusters, and against one that cannot be repeated."""
    sizes = np.full(1000, 50)
    one, again, other = quotas(sizes, 10_300, seed=1), quotas(sizes, 10_300, seed=1), quotas(sizes, 10_300, seed=2)
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert 100 < int((one[:500] - 10).sum()) < 200  # 150 ± 4 sigma of 300 drawn among 1,000
    counted = sum(quotas(np.array([5, 5, 5]), 1, seed=seed) for seed in range(300))
    assert counted.min() > 60  # each of the three gets its third of 300


def test_quotas_do_not_overflow() -> None:
    """Guards int64: a multiplier times a size beyond 2^63."""
    assert quotas(np.array([2**40, 3]), 100, multiplier=2**40).sum() == 100
    assert quotas(np.array([2**40, 0]), 2**41).tolist() == [2**40, 0]


@pytest.mark.parametrize(("sizes", "target", "multiplier"), [([1, -1], 1, 1), ([1], -1, 1), ([1], 1, 0)])
def test_nonsense_is_refused(sizes: list[int], target: int, multiplier: int) -> None:
    """Guards against a negative quota that would surface shards later."""
    with pytest.raises(PlanError):
        quotas(np.array(sizes), target, multiplier)


def random_tree(rng: np.random.Generator) -> Tree:
    widths = sorted(rng.integers(2, 60, rng.integers(1, 4)).tolist(), reverse=True)
    parents = tuple(
        np.concatenate([np.arange(above), rng.integers(0, above, below - above)])
        for below, above in itertools.pairwise(widths)
    )
    return Tree(rng.integers(0, 30, widths[0]), parents)


def test_allocation_equals_the_recursion_on_200_random_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the tree: at every node the children's quotas are the published search over their flat sizes. With passes
    of a few clusters, as a tree of millions has."""
    monkeypatch.setattr(hierarchy, "CHILDREN_PER_PASS", 8)
    rng = np.random.default_rng(1)
    for case in range(200):
        tree, multiplier = random_tree(rng), int(rng.integers(1, 3))
        total = int(tree.sizes.sum()) * multiplier
        target = int(rng.integers(0, total + 2))
        given = allocate(tree, target, multiplier, seed=case)
        assert int(given.sum()) == min(target, total)
        sizes, shares = tree.sizes, given
        for parents in tree.parents:
            above = int(parents.max()) + 1
            up = np.array([shares[parents == node].sum() for node in range(above)])
            for node in range(above):
                mine = parents == node
                assert_published(shares[mine], sizes[mine].tolist(), int(up[node]), multiplier)
            sizes = np.array([sizes[parents == node].sum() for node in range(above)])
            shares = up
        assert_published(shares, sizes.tolist(), target, multiplier)


def test_a_tree_that_does_not_fit_is_refused() -> None:
    """Guards against levels of two different runs put together."""
    with pytest.raises(PlanError, match="3 clusters but 2 parents"):
        Tree(np.ones(3, np.int64), (np.array([0, 0]),))


@pytest.mark.parametrize("how", ["random", "closest"])
@pytest.mark.parametrize("multiplier", [1, 3])
def test_balanced_draws_the_quota_whatever_the_blocks(how: str, multiplier: int) -> None:
    """Guards determinism: rows must not depend on block size or order; and each cluster gives exactly its quota."""
    rng = np.random.default_rng(2)
    clusters = rng.integers(-1, 20, 3000)
    away, keys = rng.random(3000).astype(np.float32), rng.integers(0, 2**63, 3000).astype(np.uint64)
    sizes = np.bincount(clusters[clusters >= 0], minlength=20)
    quota = allocate(Tree(sizes), 700 * multiplier, multiplier, seed=0)

    def draw(step: int, backwards: bool = False) -> tuple[np.ndarray, np.ndarray]:
        starts = list(range(0, 3000, step))
        parts = [np.arange(start, min(start + step, 3000)) for start in (starts[::-1] if backwards else starts)]
        return balanced(quota, sizes, ((p, clusters[p], away[p], keys[p]) for p in parts), how, multiplier, seed=5)

    rows, copies = draw(3000)
    for other in (draw(7), draw(100, backwards=True)):
        assert np.array_equal(rows, other[0]) and np.array_equal(copies, other[1])
    assert np.array_equal(np.bincount(clusters[rows], weights=copies, minlength=20), quota)
    assert copies.max() <= multiplier and (clusters[rows] >= 0).all()
    if how == "closest":
        for cluster in range(20):
            mine = rows[clusters[rows] == cluster]
            left = np.setdiff1d(np.flatnonzero(clusters == cluster), mine)
            assert not len(left) or not len(mine) or away[mine].max() <= away[left].min()

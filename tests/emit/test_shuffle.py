"""The order of a release: uniform, complete, the same everywhere."""

import numpy as np
import pytest

from curate.emit.ranges import runs_of
from curate.emit.shuffle import deal, even, group, permutation
from curate.schema import key_of

KEYS = [key_of(f"u{number}", None) for number in range(20_000)]


def _chi_square(table: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic of independence and its degrees of freedom."""
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    return float(((table - expected) ** 2 / expected).sum()), (table.shape[0] - 1) * (table.shape[1] - 1)


def test_exact_permutation_is_uniform_over_source_and_position() -> None:
    """Guards against tars that are still made of neighbours: source shard and place must be independent."""
    places = permutation(KEYS, 0, "a")
    assert sorted(places.tolist()) == list(range(len(KEYS)))
    source = places // 1000
    position = np.arange(len(KEYS)) // 1000
    table = np.zeros((20, 20))
    np.add.at(table, (source, position), 1)
    statistic, freedom = _chi_square(table)
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)  # 4 sigma


def test_seed_subset_and_key_decide_and_nothing_else() -> None:
    """Guards against two subsets in the same order, and against an order that depends on where rows came from."""
    first = [KEYS[place] for place in permutation(KEYS, 0, "a")]
    assert [KEYS[place] for place in permutation(KEYS, 1, "a")] != first
    assert [KEYS[place] for place in permutation(KEYS, 0, "b")] != first
    turned = KEYS[::-1]
    assert [turned[place] for place in permutation(turned, 0, "a")] == first


def test_groups_are_random_sets_of_shards_of_even_size() -> None:
    """Guards against a two-level shuffle whose groups are runs of neighbouring shards, or which loses a shard."""
    names = [f"{number:05d}" for number in range(2000)]
    chunks = deal(names, 100, 0, 10_000)
    assert sorted(name for chunk in chunks for name in chunk.shards) == names
    samples = [100 * len(chunk.shards) for chunk in chunks]
    groups = group("a", samples, samples, 10_000, 1000, None, 1)
    assert len(groups) == 20
    assert sum(one.samples for one in groups) == 200_000
    table = np.zeros((20, 20))
    for one in groups:
        for chunk in one.chunks:
            for name in chunks[chunk].shards:
                table[int(name) // 100, one.number] += 1
    statistic, freedom = _chi_square(table)
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)
    assert [one.first_tar for one in groups] == [sum(before.tars for before in groups[:at]) for at in range(20)]


def test_two_level_shuffle_is_uniform_over_groups_and_within_them() -> None:
    """Guards against a group that is written source shard by source shard, and a sample lost between the levels."""
    keys = {f"{number:03d}": KEYS[100 * number : 100 * (number + 1)] for number in range(200)}
    chunks = deal(list(keys), 100, 0, 2_000)
    samples = [sum(len(keys[name]) for name in chunk.shards) for chunk in chunks]
    groups = group("a", samples, samples, 2_000, 500, None, 1)
    assert len(groups) == 10
    emitted: list[str] = []
    over = np.zeros((10, 10))  # which tenth of the source came into which group
    within = np.zeros((4, 10))  # a group's shards in four parts, over ten places
    for one in groups:
        names = [name for chunk in one.chunks for name in chunks[chunk].shards]
        mine = [key for name in names for key in keys[name]]
        places = permutation(mine, 0, "a")
        emitted += [mine[place] for place in places]
        np.add.at(within, (places * 4 // len(mine), np.arange(len(mine)) * 10 // len(mine)), 1)
        for name in names:
            over[int(name) // 20, one.number] += len(keys[name])
    assert sorted(emitted) == sorted(KEYS)  # no sample twice, none missing
    statistic, freedom = _chi_square(within)
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)
    # Shards are dealt whole: the statistic counts shards, not samples.
    statistic, freedom = _chi_square(over / 100)
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("samples", [[0], [], [0, 0, 7], [1] * 50, [30, 0, 1, 500, 2]])
@pytest.mark.parametrize("limit", [1, 10, 10_000])
def test_groups_hold_every_sample_once(samples: list[int], limit: int) -> None:
    """Guards against chunks dropped at the edges: empty ones first, last or between."""
    groups = group("a", samples, samples, limit, 5, None, 3)
    assert sorted(chunk for one in groups for chunk in one.chunks) == [at for at, some in enumerate(samples) if some]
    for one in groups:
        assert sum(one.tar_samples) == one.samples
        assert all(0 < size <= 5 for size in one.tar_samples)
    if sum(samples) >= 3:
        assert sum(one.tars for one in groups) >= 3


def test_tars_by_bytes_and_at_least_as_many_as_workers() -> None:
    """Guards against a trainer that asserts on fewer tars than loader workers, and against tars of 100 GB."""
    assert group("a", [100], [10**6], 1000, 1000, None, 8)[0].tars == 8
    assert group("a", [100], [10**6], 1000, 1000, 50_000, 1)[0].tars == 20
    assert group("a", [3], [10**6], 1000, 1000, None, 8)[0].tar_samples == (1, 1, 1)
    assert even(10, 3) == (4, 3, 3)


def test_neighbouring_ranges_are_one_request() -> None:
    """Guards against a request per sample on an object store, and against gaps that are read for nothing."""
    runs = runs_of([1000, 0, 5000, 90], [10, 80, 100, 10], gap=50, most=10_000)
    assert [(run.start, run.end, run.rows) for run in runs] == [
        (0, 100, (1, 3)),
        (1000, 1010, (0,)),
        (5000, 5100, (2,)),
    ]
    assert [(run.start, run.end) for run in runs_of([0, 10, 20], [10, 10, 10], gap=5, most=20)] == [(0, 20), (20, 30)]
    assert runs_of([], []) == []

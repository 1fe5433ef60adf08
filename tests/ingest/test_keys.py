"""Keys by whole columns, and which row came first."""

import numpy as np
import pyarrow as pa
import pytest

from curate.ingest.keys import among, hash_rows, hex_keys, merge, partition_of, same_as_before, sort_keys
from curate.schema import keys_of


def _raw(rows: int, distinct: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (distinct, 16), np.uint8)[rng.integers(0, distinct, rows)]


def test_columns_are_hashed_as_single_pairs_are() -> None:
    """Guards against two identities of one sample: the fast path must agree with key_of, nulls, slices and all."""
    urls = ["http://a", None, "", "ü" * 300, "http://a", "b\0c"]
    texts = ["x", "x", None, "", "\U0001f600", "http"]
    found = hex_keys(hash_rows(pa.array(urls), pa.array(texts))).to_pylist()
    assert found == keys_of(urls, texts)
    sliced = hex_keys(hash_rows(pa.array(urls)[2:5], pa.array(texts, pa.string())[2:5])).to_pylist()
    assert sliced == keys_of(urls, texts)[2:5]
    assert hex_keys(hash_rows(pa.array([], pa.string()), pa.array([], pa.string()))).to_pylist() == []


def test_first_of_equal_keys_is_found() -> None:
    """Guards against an unstable order: which copy stays would depend on the sort."""
    raw = _raw(5_000, 700)
    order = sort_keys(raw)
    firsts = sorted(order[~same_as_before(raw[order])].tolist())
    seen: dict[bytes, int] = {}
    for row, key in enumerate(raw):
        seen.setdefault(key.tobytes(), row)
    assert firsts == sorted(seen.values())
    assert [key.tobytes() for key in raw[order]] == sorted(key.tobytes() for key in raw)


def test_keys_that_share_their_first_half_are_told_apart() -> None:
    """Guards against an exact step that compares 64 bits only."""
    raw = np.zeros((4, 16), np.uint8)
    raw[:, 15] = [2, 1, 2, 1]
    order = sort_keys(raw)
    assert order.tolist() == [1, 3, 0, 2]
    assert same_as_before(raw[order]).tolist() == [False, True, False, True]


@pytest.mark.parametrize("partitions", [1, 2, 64, 65_536])
def test_partitions_cut_the_sorted_keys_in_order(partitions: int) -> None:
    """Guards against key files that cannot be joined: partition p must hold smaller keys than p + 1."""
    raw = _raw(3_000, 3_000, seed=1)
    parts = partition_of(raw[sort_keys(raw)], partitions)
    assert np.all(np.diff(parts.astype(np.int64)) >= 0)
    assert parts.max() < partitions


def test_membership_agrees_with_sets() -> None:
    """Guards against a repeat of an earlier batch that is not seen."""
    one, other = (np.unique(_raw(900, 500, seed), axis=0) for seed in (3, 3))
    one, other = one[::2], other[::3]
    known = {key.tobytes() for key in other}
    assert among(one, other).tolist() == [key.tobytes() in known for key in one]
    both = merge(other, one[~among(one, other)])
    assert len(both) == len({key.tobytes() for key in [*one, *other]})
    assert among(one, both).all()

"""Pairs of hashes within a radius: against brute force, on hashes as the web has them, and in bounded memory."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.dedup import hamming, hamming_match, hamming_tables
from curate.dedup.components import groups
from curate.dedup.hamming import HashArray, IntArray, edges_in_table, edges_within, pairs_within
from curate.dedup.hamming_tables import Tables, plan_tables
from curate.errors import PlanError


def _brute_force(hashes: HashArray, radius: int) -> IntArray:
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= radius
    return np.argwhere(np.triu(near, 1)).astype(np.int64)


def _planted(seed: int, n: int, radius: int, mask: int = 2**64 - 1) -> HashArray:
    """Random hashes; a third of them copies of others with up to radius + 1 bits flipped."""
    draw = np.random.default_rng(seed)
    hashes = draw.integers(0, 2**64, n, dtype=np.uint64) & np.uint64(mask)
    for _ in range(n // 3):
        copy = hashes[draw.integers(n)]
        for bit in draw.integers(0, 64, draw.integers(0, radius + 2)):
            copy ^= np.uint64(1) << np.uint64(bit)
        hashes[draw.integers(n)] = copy
    return hashes


def _phashes(seed: int, n: int) -> HashArray:
    """Hashes as imagehash.phash makes them: top bit 1, exactly 32 bits set; the rest at random."""
    values = np.random.default_rng(seed).random((n, 64))
    values[:, 0] = -1
    bits = np.argsort(np.argsort(values, axis=1), axis=1) < 32
    return np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)


@pytest.fixture
def tables_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small inputs take the way of large ones: tables, long runs, plans inside plans."""
    monkeypatch.setattr(hamming_tables, "CANDIDATE_NS", 1e6)
    monkeypatch.setattr(hamming_match, "SMALL", 8)
    monkeypatch.setattr(hamming_match, "LONG_RUN", 4)
    monkeypatch.setattr(hamming_match, "CHUNK_ROWS", 16)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=60), st.integers(0, 10), st.integers(0, 2**64 - 1))
def test_pairs_are_those_of_brute_force(values: list[int], radius: int, mask: int) -> None:
    """A pair lost, doubled or out of order."""
    hashes = np.array([value & mask for value in values], np.uint64)
    found = pairs_within(hashes, radius)
    assert found.dtype == np.int64 and found.shape == (len(found), 2)
    np.testing.assert_array_equal(found, _brute_force(hashes, radius))


@pytest.mark.usefixtures("tables_always")
@pytest.mark.parametrize("radius", range(11))
@pytest.mark.parametrize("mask", [2**64 - 1, 0xFFF0F0, 0xFFFF])
def test_tables_lose_no_pair(radius: int, mask: int) -> None:
    """A pair that belongs to no table or to two; a run planned again that forgets what it came from."""
    hashes = _planted(radius, 150 if radius < 8 else 60, radius, mask)
    np.testing.assert_array_equal(pairs_within(hashes, radius), _brute_force(hashes, radius))


@pytest.mark.usefixtures("tables_always")
def test_phashes_are_not_uniform_and_all_pairs_are_found() -> None:
    """Blocks cut at fixed places: a constant bit in one of them, and the popcount ties the others."""
    hashes = _phashes(0, 600)
    assert set(np.bitwise_count(hashes)) == {32} and (hashes >> np.uint64(63) == 1).all()
    hashes[:200] = hashes[200:400] ^ np.uint64(0b101)
    np.testing.assert_array_equal(pairs_within(hashes, 3), _brute_force(hashes, 3))


def test_constant_bits_are_dealt_over_the_blocks() -> None:
    """Near-blank images vary in few bits; blocks of constant bits would make one run of all."""
    draw = np.random.default_rng(0)
    hashes = np.unique(draw.integers(0, 2**40, 200_000, dtype=np.uint64) | np.uint64(0xF0F0F0 << 40))
    plan = plan_tables(hashes, 3)
    varying = [(block & (2**40 - 1)).bit_count() for block in plan.blocks]
    assert max(varying) - min(varying) <= 1
    assert plan.predicted_candidates < 0.01 * len(hashes) ** 2 / 2


def test_many_near_blank_hashes_stay_fast_and_exact() -> None:
    """60,000 different hashes that share 24 bits, among random ones: in quadratic time 4e9 comparisons a table."""
    draw = np.random.default_rng(1)
    blank = draw.integers(0, 2**40, 60_000, dtype=np.uint64) | np.uint64(0xABCDEF << 40)
    hashes = np.concatenate([blank, draw.integers(0, 2**64, 60_000, dtype=np.uint64)])
    hashes[:500] = hashes[60_000 - 500 : 60_000] ^ np.uint64(0x8000000000000100)
    found = pairs_within(hashes, 3)
    assert (np.bitwise_count(hashes[found[:, 0]] ^ hashes[found[:, 1]]) <= 3).all()
    planted = np.stack([np.arange(500), np.arange(59_500, 60_000)], axis=1)
    assert set(map(tuple, planted)) <= set(map(tuple, found))


def test_threads_change_nothing() -> None:
    """An order of completion that shows in the result."""
    hashes = _planted(3, 30_000, 3)
    one, _ = edges_within(hashes, 3, threads=1)
    np.testing.assert_array_equal(one, edges_within(hashes, 3, threads=4)[0])
    np.testing.assert_array_equal(pairs_within(hashes, 3, threads=1), pairs_within(hashes, 3, threads=4))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10), st.sampled_from([2**64 - 1, 0xFF]))
def test_edges_have_the_components_of_the_pairs(seed: int, radius: int, mask: int) -> None:
    """An edge folded away that held two parts together; a forest as long as the list of pairs."""
    hashes = _planted(seed, 80, radius, mask)
    edges, _ = edges_within(hashes, radius)
    pairs = pairs_within(hashes, radius)
    assert set(map(tuple, edges)) <= set(map(tuple, pairs)) and len(edges) < len(hashes)
    np.testing.assert_array_equal(groups(80, edges), groups(80, pairs))


def test_folding_edges_early_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that depends on the memory it was given."""
    hashes = _planted(5, 3_000, 6, 0xFFFFFF)
    whole, _ = edges_within(hashes, 6)
    monkeypatch.setattr(hamming_match, "MATCHES", 64)
    monkeypatch.setattr(hamming, "BYTES_PER_PAIR", 1 << 40)  # a limit of the smallest buffer, 65,536
    np.testing.assert_array_equal(whole, edges_within(hashes, 6)[0])


def test_a_million_equal_hashes_are_refused_or_a_star() -> None:
    """5e11 pairs in memory."""
    hashes = np.full(1_000_000, 7, np.uint64)
    with pytest.raises(PlanError, match=r"499,999,500,000 pairs.*edges_within"):
        pairs_within(hashes, 3)
    edges, _ = edges_within(hashes, 3)
    assert len(edges) == 999_999 and (edges[:, 0] == 0).all() and (edges[:, 1] == np.arange(1, 1_000_000)).all()


def test_half_of_all_hashes_equal() -> None:
    """A group of equal hashes that hides the pairs of the others, or its own with them."""
    hashes = _planted(9, 4_000, 3)
    hashes[::2] = hashes[1]
    edges, _ = edges_within(hashes, 3)
    np.testing.assert_array_equal(groups(4_000, edges), groups(4_000, _brute_force(hashes, 3)))


@pytest.mark.usefixtures("tables_always")
@pytest.mark.parametrize(("radius", "mask"), [(0, 0xFFFF), (3, 2**64 - 1), (3, 0xFFFFF), (5, 0xFFFF)])
def test_fresh_hashes_join_what_is_known(radius: int, mask: int) -> None:
    """A pair of a new hash with an old one that is lost, or an old group that is forgotten."""
    hashes = _planted(13, 400, radius, mask)
    fresh = np.random.default_rng(0).random(400) < 0.3
    old = np.flatnonzero(~fresh)
    known = old[edges_within(hashes[old], radius)[0]]
    edges, _ = edges_within(hashes, radius, fresh=fresh)
    both = np.concatenate([known, edges])
    np.testing.assert_array_equal(groups(400, both), groups(400, _brute_force(hashes, radius)))


def test_known_pairs_are_not_compared() -> None:
    """A refresh that costs as much as the first run."""
    hashes = np.unique(_planted(4, 500, 3))
    n, fresh = len(hashes), np.arange(len(hashes)) % 10 == 0
    new = int(fresh.sum())
    assert edges_within(hashes, 3)[1] == n * (n - 1) // 2
    assert edges_within(hashes, 3, fresh=fresh)[1] == new * (new - 1) // 2 + new * (n - new)
    assert edges_within(hashes, 3, fresh=np.zeros(n, bool))[1] == 0
    many = np.unique(_phashes(0, 200_000))
    some = np.arange(len(many)) % 100 == 0
    assert edges_within(many, 3, fresh=some)[1] < 0.05 * edges_within(many, 3)[1]


@pytest.mark.parametrize("radius", [3, 8])
def test_half_of_all_hashes_nearly_equal_are_joined_and_not_compared(radius: int) -> None:
    """One image in a hundred thousand slightly different versions: 2e9 pairs, of which a chain is enough."""
    draw = np.random.default_rng(2)
    hashes = _phashes(1, 200_000)
    flips = np.uint64(1) << draw.integers(0, 63, (4, 100_000)).astype(np.uint64)
    hashes[::2] = hashes[0] ^ flips[0] ^ flips[1] ^ flips[2] ^ flips[3]
    hashes[1] = hashes[0] ^ np.uint64(0x1F)  # five bits off, from two of the flipped ones less
    edges, compared = edges_within(hashes, radius)
    group = groups(len(hashes), edges)
    assert (np.bitwise_count(hashes[edges[:, 0]] ^ hashes[edges[:, 1]]) <= radius).all() and len(edges) < len(hashes)
    assert (group[::2] == 0).all() and group[1] == 0
    others = np.arange(3, len(hashes), 2)
    near = np.array([np.bitwise_count(hashes[::2] ^ hashes[at]).min() <= radius for at in others[:500]])
    np.testing.assert_array_equal(group[others[:500]] == 0, near)
    assert compared < 100_000 * 1_000


@pytest.mark.parametrize("size", [0, 1, 2])
def test_hardly_any_hashes(size: int) -> None:
    """An empty shard that raises."""
    assert len(pairs_within(np.zeros(size, np.uint64), 3)) == size // 2
    assert len(edges_within(np.zeros(size, np.uint64), 3)[0]) == size // 2


@pytest.mark.parametrize("count", [4, 5, 6])
def test_partitions_of_tables_find_each_pair_once(count: int) -> None:
    """Pairs that fall on different workers and are missed, or are reported by two tables."""
    hashes = _planted(11, 2_000, 3)
    blocks = tuple(hamming_tables._deal(np.ones(64), count))
    tables = Tables(3, blocks, hamming_tables._cover(count, 3, 3), 0, 0)
    found = []
    for table in range(len(tables)):
        part = tables.permute(hashes, table) >> np.uint64(61)  # eight workers
        for worker in range(8):
            mine = np.flatnonzero(part == worker)
            found.append(mine[edges_in_table(hashes[mine], tables, table)[0]])
    edges = np.concatenate(found)
    np.testing.assert_array_equal(groups(2_000, edges), groups(2_000, _brute_force(hashes, 3)))
    different = edges[hashes[edges[:, 0]] != hashes[edges[:, 1]]]
    values = hashes[different]
    assert len(np.unique(np.sort(values, axis=1), axis=0)) == len(values)


def test_permuting_is_undone_and_keeps_distances() -> None:
    """A bit lost or doubled on the way to the top."""
    hashes = _planted(2, 100_000, 3)
    tables = plan_tables(hashes, 3)
    for table in (0, len(tables) - 1):
        permuted = tables.permute(hashes, table)
        np.testing.assert_array_equal(tables.restore(permuted, table), hashes)
        before, after = hashes[1:] ^ hashes[:-1], permuted[1:] ^ permuted[:-1]
        np.testing.assert_array_equal(np.bitwise_count(before), np.bitwise_count(after))


@pytest.mark.parametrize(
    ("hashes", "radius", "says"),
    [
        (np.zeros(3, np.int64), 3, r"int64\[3\]; expected uint64\[N\]"),
        (np.zeros((3, 2), np.uint64), 3, "expected uint64"),
        ([1, 2], 3, "hashes are list"),
        (np.zeros(3, np.uint64), 11, "radius is 11; expected 0 … 10"),
        (np.zeros(3, np.uint64), -1, "radius is -1"),
    ],
)
def test_wrong_input_is_named(hashes: HashArray, radius: int, says: str) -> None:
    """A signed or stringly hash that is compared as something else."""
    with pytest.raises(PlanError, match=says):
        pairs_within(hashes, radius)


def test_real_images_are_found_again_after_small_changes() -> None:
    """A radius that finds what is synthetic only: re-encoded, resized and brightened photographs."""
    if "CURATE_SHARED" not in os.environ:
        pytest.skip("needs CURATE_SHARED with realdata")
    import imagehash
    from PIL import Image, ImageEnhance

    files = sorted((Path(os.environ["CURATE_SHARED"]) / "realdata/images/text_none").glob("*.jpg"))[:40]
    hashes: list[int] = []
    for file in files:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        small = image.resize((max(8, image.width // 2), max(8, image.height // 2)))
        versions = (image, small, ImageEnhance.Brightness(image).enhance(1.12))
        hashes += [int(str(imagehash.phash(version)), 16) for version in versions]
    found = set(map(tuple, pairs_within(np.array(hashes, np.uint64), 6).tolist()))
    copies = [(3 * at, 3 * at + change) for at in range(len(files)) for change in (1, 2)]
    assert sum(copy in found for copy in copies) / len(copies) >= 0.9

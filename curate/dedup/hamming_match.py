"""Which hashes are within a radius, as a stream of matches: inside one set, and between two.

Hashes are sorted by the key of each table (`hamming_tables`) and compared inside the runs of one key. A long run of
different hashes with one key (near-blank images) is planned again by itself, from its own bits. Where only the
components of the matches are asked for (`joined`), hashes that are connected already are not compared: half of all
images being nearly one and the same costs a few passes over them, not all their pairs.

All functions take different hashes (equal ones are folded before) and yield triples: hashes, a hash within the radius
of each, and how many pairs were compared since the last triple. They know no positions and no files.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from curate.dedup.components import groups
from curate.dedup.hamming_tables import HashArray, Tables, permute_bits, plan_tables

Match = tuple[HashArray, HashArray, int]

CHUNK_ROWS = 1 << 16  # 512 kB of hashes: xor, count and compare stay in the second-level cache
LONG_RUN = 512  # a run of one key beyond this is planned again; below, comparing all with all is cheaper than a plan
SMALL = 4_096  # all with all takes 10 ms
MAX_DEPTH = 4
DENSE = 0.12  # below this share of active rows, gathering them beats sweeping the whole chunk
MATCHES = 1 << 20  # pairs handed over at a time
ORDERS = 12  # of the bits, at most, in which neighbours are joined before the rest is compared
CROWD = 128  # one key of so few hashes: by chance, of 4,096 sampled ones, no key comes 32 times
NEIGHBOURS = 4  # of each hash in such an order


def within(values: HashArray, radius: int, *, joined: bool, depth: int = 0) -> Iterator[Match]:
    """Matches among these hashes: all of them, or if `joined` enough to connect what all of them connect."""
    if len(values) <= SMALL or depth >= MAX_DEPTH:
        yield from _all_with_all(values, radius)
        return
    if joined and depth:
        edges, inside = join_neighbours(values, radius)
        yield edges
        if 2 * inside.sum() > len(values):
            yield from within(values[~inside], radius, joined=True, depth=depth + 1)
            yield from between(values[~inside], values[inside], radius, joined=True, depth=depth + 1)
            return
    tables = plan_tables(values, radius)
    if not len(tables):
        yield from _all_with_all(values, radius)
    for table in range(len(tables)):
        yield from within_table(values, tables, table, joined=joined, depth=depth)


def between(left: HashArray, right: HashArray, radius: int, *, joined: bool, depth: int = 0) -> Iterator[Match]:
    """Matches of one set with another, none inside a set but what `joined` needs; the sets share no hash."""
    if len(left) * len(right) <= SMALL**2 or depth >= MAX_DEPTH:
        yield from _each_with_each(left, right, radius)
        return
    if joined and depth:
        edges, inside = join_neighbours(np.concatenate([left, right]), radius)
        yield edges
        mine, other = inside[: len(left)], inside[len(left) :]
        if 2 * mine.sum() > len(left) and 2 * other.sum() > len(right):
            yield from between(left[~mine], right, radius, joined=True, depth=depth + 1)
            yield from between(left[mine], right[~other], radius, joined=True, depth=depth + 1)
            return
    tables = plan_tables(np.concatenate([left, right]), radius, pairs=float(len(left)) * len(right))
    if not len(tables):
        yield from _each_with_each(left, right, radius)
    for table in range(len(tables)):
        yield from between_table(left, right, tables, table, joined=joined, depth=depth)


def within_table(values: HashArray, tables: Tables, table: int, *, joined: bool, depth: int = 0) -> Iterator[Match]:
    """A table's share of `within`. If `joined`, matches of long runs may come from other tables too."""
    permuted = tables.permute(values, table)
    permuted.sort()
    shift = np.uint64(64 - tables.key_bits(table))
    for start, stop in _chunks(permuted, shift):
        chunk = permuted[start:stop]
        keys = chunk >> shift
        edges = _edges(keys)
        runs = np.diff(edges)
        if (long := runs > LONG_RUN).any():
            for run in np.flatnonzero(long):
                part = chunk[edges[run] : edges[run + 1]]
                found = within(part, tables.radius, joined=joined, depth=depth + 1)
                yield from _restored(found, tables, table, every=joined)
            short = np.repeat(~long, runs)
            chunk, keys, runs = chunk[short], keys[short], runs[~long]
        yield from _restored(_in_runs(chunk, keys, runs, tables.radius), tables, table, every=False)


def between_table(
    left: HashArray, right: HashArray, tables: Tables, table: int, *, joined: bool, depth: int = 0
) -> Iterator[Match]:
    """A table's share of `between`."""
    shift = np.uint64(64 - tables.key_bits(table))
    left, right = tables.permute(left, table), tables.permute(right, table)
    left.sort()
    keys = left >> shift
    starts = _edges(keys)
    names = keys[starts[:-1]]
    right = right[_isin(right >> shift, names)]
    right.sort()
    others = _edges(right >> shift)
    runs = np.searchsorted(names, right[others[:-1]] >> shift)  # the run on the left of each run on the right
    here, there = np.diff(starts)[runs], np.diff(others)
    for run in np.flatnonzero(here * there > LONG_RUN**2):
        mine, theirs = left[starts[runs[run]] : starts[runs[run] + 1]], right[others[run] : others[run + 1]]
        found = between(mine, theirs, tables.radius, joined=joined, depth=depth + 1)
        yield from _restored(found, tables, table, every=joined)
    short = np.flatnonzero(here * there <= LONG_RUN**2)
    sizes = (here * there)[short]
    ends = np.cumsum(sizes)
    at = 0
    while at < len(short):
        stop = max(at + 1, int(np.searchsorted(ends, (ends[at - 1] if at else 0) + MATCHES, "right")))
        part = short[at:stop]
        which = np.repeat(np.arange(len(part)), sizes[at:stop])
        place = np.arange(len(which)) - np.repeat(np.cumsum(sizes[at:stop]) - sizes[at:stop], sizes[at:stop])
        i, j = np.divmod(place, there[part][which])
        a, b = left[starts[runs[part]][which] + i], right[others[part][which] + j]
        hit = np.flatnonzero(np.bitwise_count(a ^ b) <= tables.radius)
        yield from _restored(iter([(a[hit], b[hit], len(a))]), tables, table, every=False)
        at = stop


def is_crowded(values: HashArray, tables: Tables) -> bool:
    """Whether one key of some table has one in CROWD of these hashes or more: nearly equal ones."""
    sample = values[:: max(1, len(values) // SMALL)]
    for table in range(len(tables) if len(sample) >= SMALL else 0):
        keys = np.sort(tables.permute(sample, table) >> np.uint64(64 - tables.key_bits(table)))
        if (keys[len(keys) // CROWD :] == keys[: len(keys) - len(keys) // CROWD]).any():
            return True
    return False


def join_neighbours(values: HashArray, radius: int) -> tuple[Match, npt.NDArray[np.bool_]]:
    """Matches between neighbours in some orders of the bits, and which hashes the largest of their components holds.

    One order after another, as long as that component grows and may come to hold most: nearly equal images are all
    joined within a few, unlike ones give up after the second.
    """
    draw = np.random.default_rng(0)
    label = np.arange(len(values), dtype=np.int64)
    found: list[npt.NDArray[np.int64]] = []
    largest, compared = 1, 0
    for turn in range(ORDERS):
        order = np.argsort(permute_bits(values, draw.permutation(64)))
        laid = values[order]
        for offset in range(1, NEIGHBOURS + 1):
            hit = np.flatnonzero(np.bitwise_count(laid[offset:] ^ laid[:-offset]) <= radius)
            pairs = np.stack([order[hit], order[hit + offset]], axis=1)
            found.append(pairs[label[pairs[:, 0]] != label[pairs[:, 1]]])
            compared += len(laid) - offset
        label = groups(len(values), np.concatenate(found))
        before, largest = largest, int(np.bincount(label).max())
        if largest < 1.01 * before or (turn and 16 * largest < len(values)):
            break
    edges = np.concatenate(found)
    inside = np.asarray(label == np.bincount(label).argmax())
    return (values[edges[:, 0]], values[edges[:, 1]], compared), inside


def _restored(found: Iterator[Match], tables: Tables, table: int, *, every: bool) -> Iterator[Match]:
    """Matches of permuted hashes as those of hashes; unless `every`, those only that are this table's to report."""
    for left, right, compared in found:
        a, b = tables.restore(left, table), tables.restore(right, table)
        if not every:
            mine = tables.owned(a, b, table)
            a, b = a[mine], b[mine]
        yield a, b, compared


def _edges(keys: HashArray) -> npt.NDArray[np.int64]:
    """Where the runs of equal keys start, and the end of the last."""
    return np.flatnonzero(np.r_[True, keys[1:] != keys[:-1], True]) if len(keys) else np.zeros(1, np.int64)


def _isin(keys: HashArray, names: HashArray) -> npt.NDArray[np.bool_]:
    """Which keys are among the names, which ascend."""
    if not len(names):
        return np.zeros(len(keys), np.bool_)
    at = np.searchsorted(names, keys).clip(max=len(names) - 1)
    return np.asarray(names[at] == keys)


def _chunks(ordered: HashArray, shift: np.uint64) -> Iterator[tuple[int, int]]:
    """Cut where the key changes; a chunk is longer than CHUNK_ROWS only when it is one run."""
    start, n = 0, len(ordered)
    while start < n:
        stop = start + CHUNK_ROWS
        if stop >= n:
            stop = n
        else:
            key = ordered[stop] >> shift << shift
            stop = int(np.searchsorted(ordered, key, "left"))
            if stop <= start:
                last = key | ((np.uint64(1) << shift) - np.uint64(1))
                stop = int(np.searchsorted(ordered, last, "right"))
        yield start, stop
        start = stop


def _in_runs(chunk: HashArray, keys: HashArray, runs: npt.NDArray[np.int64], radius: int) -> Iterator[Match]:
    """Matches in every run of one key (and, rarely, some across runs)."""
    if len(runs) and (longest := int(runs.max())) > 1:
        sizes = np.bincount(runs, minlength=longest + 1)
        at_least = np.cumsum(sizes[::-1])[::-1]  # runs of this length or more
        active = np.cumsum(at_least[::-1])[::-1]  # rows whose run reaches at least this far, the row included
        yield from _sweep(chunk, keys, radius, active)


def _sweep(chunk: HashArray, keys: HashArray, radius: int, active: npt.NDArray[np.int64]) -> Iterator[Match]:
    """Compare each row with the rows `offset` further, for every offset that some run reaches."""
    found: list[tuple[HashArray, HashArray]] = []
    held = compared = 0
    rows: npt.NDArray[np.int64] | None = None
    for offset in range(1, len(active) - 1):
        if active[offset + 1] >= DENSE * len(chunk):
            hit = np.flatnonzero(np.bitwise_count(chunk[offset:] ^ chunk[:-offset]) <= radius)
            compared += len(chunk) - offset
        else:
            if rows is None:
                rows = np.flatnonzero(keys[offset:] == keys[:-offset])
            else:
                rows = rows[: np.searchsorted(rows, len(chunk) - offset)]
                rows = rows[keys[rows] == keys[rows + offset]]
            hit = rows[np.bitwise_count(chunk[rows] ^ chunk[rows + offset]) <= radius]
            compared += len(rows)
        if len(hit):
            found.append((chunk[hit], chunk[hit + offset]))
            held += len(hit)
        if held >= MATCHES:
            yield _concatenated(found, compared)
            found, held, compared = [], 0, 0
    yield _concatenated(found, compared)


def _all_with_all(values: HashArray, radius: int) -> Iterator[Match]:
    one_run = np.zeros(len(values), np.uint64)
    active = np.arange(len(values) + 1, 0, -1)
    yield from _sweep(values, one_run, radius, active)


def _each_with_each(left: HashArray, right: HashArray, radius: int) -> Iterator[Match]:
    few, many = (left, right) if len(left) <= len(right) else (right, left)
    for start in range(0, len(many), CHUNK_ROWS):
        part = many[start : start + CHUNK_ROWS]
        step = max(1, CHUNK_ROWS // len(part))
        for at in range(0, len(few), step):
            i, j = np.nonzero(np.bitwise_count(few[at : at + step, None] ^ part) <= radius)
            yield few[at + i], part[j], len(few[at : at + step]) * len(part)


def _concatenated(found: list[tuple[HashArray, HashArray]], compared: int) -> Match:
    none = np.empty(0, np.uint64)
    return np.concatenate([none, *[one for one, _ in found]]), np.concatenate([none, *[b for _, b in found]]), compared

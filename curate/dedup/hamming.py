"""All pairs of 64-bit hashes within a Hamming radius: exact, in memory that is bounded and stated.

Block permutation (Manku, Jain, Das Sarma, WWW 2007): per table of `hamming_tables`, sort the permuted hashes and
compare the neighbours that share the table's key. Three things keep it near-linear on what the web holds:

- equal hashes (blank images, placeholders) are folded into one before anything is compared;
- a long run of different hashes with one key (near-blank images) is planned again by itself, from its own bits;
- matches go to a sink that bounds memory: `pairs_within` refuses when the list of pairs cannot fit, `edges_within`
  keeps only the edges that hold the components together.

It knows nothing of images, keys or files.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from curate.dedup.components import spanning_forest
from curate.dedup.hamming_tables import HashArray, Tables, plan_tables
from curate.errors import PlanError

IntArray = npt.NDArray[np.int64]
Match = tuple[HashArray, HashArray]

MAX_RADIUS = 10
CHUNK_ROWS = 1 << 16  # 512 kB of hashes: xor, count and compare stay in the second-level cache
LONG_RUN = 512  # a run of one key beyond this is planned again; below, comparing all with all is cheaper than a plan
SMALL = 4_096  # all with all takes 10 ms
MAX_DEPTH = 4
DENSE = 0.12  # below this share of active rows, gathering them beats sweeping the whole chunk
# Peak per pair while the list is unfolded and sorted: tracemalloc saw 103 (equal hashes) to 128 (all different).
BYTES_PER_PAIR = 128
MATCHES = 1 << 20  # pairs handed over at a time


def pairs_within(hashes: HashArray, radius: int, *, memory_gb: float = 4.0, threads: int | None = None) -> IntArray:
    """Find every pair of hashes at Hamming distance `radius` or less.

    Args:
        hashes: uint64[N].
        radius: 0 … 10; 0 finds equal hashes.
        memory_gb: what the list of pairs and its sorting may take, besides about 60 bytes a hash and thread.
        threads: tables worked at a time; default: the cores this process may use.

    Returns:
        int64[M, 2]: positions i < j, each pair once, ascending. The same for any `threads`.

    Raises:
        PlanError: wrong dtype, shape or radius; or the pairs need more than `memory_gb` (a million equal hashes are
            5e11 pairs: `edges_within` gives the same components from a million edges).
    """
    _check(hashes, radius)
    fold = _Fold(hashes)
    sink = _AllPairs(fold, int(memory_gb * 1e9 / BYTES_PER_PAIR))
    _match(fold.distinct, radius, sink, threads)
    return sink.unfold()


def edges_within(hashes: HashArray, radius: int, *, memory_gb: float = 4.0, threads: int | None = None) -> IntArray:
    """Find edges with the components of `pairs_within`, and at most N - 1 of them.

    The edges are those of the minimum spanning forest of all pairs under the order (distance, i, j), which is unique:
    equal hashes hang on their first one, and near ones are joined by the nearest pair. So the result depends neither
    on `memory_gb` nor on `threads`.

    Args:
        hashes: uint64[N].
        radius: 0 … 10.
        memory_gb: what edges may take before they are folded into a forest.
        threads: as in `pairs_within`.

    Returns:
        int64[M, 2]: positions i < j, each a true pair, ascending.

    Raises:
        PlanError: wrong dtype, shape or radius.
    """
    _check(hashes, radius)
    fold = _Fold(hashes)
    sink = _Forest(fold, max(1 << 16, int(memory_gb * 1e9 / BYTES_PER_PAIR)))
    _match(fold.distinct, radius, sink, threads)
    return _ascending(np.concatenate([fold.stars(), sink.fold_away()]), len(hashes))


def edges_in_table(hashes: HashArray, tables: Tables, table: int) -> IntArray:
    """Find one table's share of the edges, for hashes that were partitioned by that table's key.

    Over all tables, and over all partitions of each, every pair of different hashes within the radius is found once;
    equal hashes hang on their first one, in table 0 only. `hashes` must hold all that share a key with any of them.

    Args:
        hashes: uint64[N] as given (not permuted).
        tables: the plan, the same for the whole corpus.
        table: which of its tables.

    Returns:
        int64[M, 2]: positions i < j, ascending; different hashes are named by their first position.

    Raises:
        PlanError: wrong dtype or shape, no such table, or more pairs than 4 GB hold.
    """
    _check(hashes, tables.radius)
    if not 0 <= table < len(tables):
        raise PlanError(f"edges_in_table: table is {table}; the plan has {len(tables)} tables")
    fold = _Fold(hashes)
    sink = _Forest(fold, int(4e9 / BYTES_PER_PAIR))
    for match in _table_matches(fold.distinct, tables, table, 0):
        sink.take(*match)
    stars = fold.stars() if table == 0 else np.empty((0, 2), np.int64)
    return _ascending(np.concatenate([stars, sink.fold_away()]), len(hashes))


def _check(hashes: HashArray, radius: int) -> None:
    if not isinstance(hashes, np.ndarray) or hashes.dtype != np.uint64 or hashes.ndim != 1:
        got = f"{hashes.dtype}{list(hashes.shape)}" if isinstance(hashes, np.ndarray) else type(hashes).__name__
        raise PlanError(f"hashes are {got}; expected uint64[N] (view int64 as uint64)")
    if not 0 <= radius <= MAX_RADIUS:
        raise PlanError(f"radius is {radius}; expected 0 … {MAX_RADIUS}")


def _ascending(pairs: IntArray, n: int) -> IntArray:
    if n < 1 << 31:
        code = np.sort(pairs[:, 0] * n + pairs[:, 1])
        return np.stack(np.divmod(code, max(n, 1)), axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


class _Fold:
    """Equal hashes as one: the distinct values, and which positions hold each."""

    def __init__(self, hashes: HashArray) -> None:
        self.order = np.argsort(hashes, kind="stable")
        ordered = hashes[self.order]
        self.start = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(hashes) else np.empty(0, np.int64)
        self.distinct: HashArray = ordered[self.start]
        self.count = np.diff(np.r_[self.start, len(hashes)])

    def first(self, values: HashArray) -> IntArray:
        """Return the first position of each value."""
        return self.order[self.start[np.searchsorted(self.distinct, values)]]

    def stars(self) -> IntArray:
        """Return the edges from each hash's first position to its other ones."""
        head = np.repeat(self.order[self.start], self.count) if len(self.start) else self.order
        other = np.ones(len(self.order), bool)
        other[self.start] = False
        return np.stack([head[other], self.order[other]], axis=1)


class _AllPairs:
    """Collects every match; refuses as soon as the list cannot fit."""

    def __init__(self, fold: _Fold, limit: int) -> None:
        self.fold, self.limit = fold, limit
        self.lock = threading.Lock()
        self.parts: list[tuple[IntArray, IntArray]] = []
        self.total = sum(int(c) * (int(c) - 1) // 2 for c in fold.count[fold.count > 1])
        self._refuse_excess()

    def take(self, left: HashArray, right: HashArray) -> None:
        """Add matches between distinct values."""
        a, b = np.searchsorted(self.fold.distinct, left), np.searchsorted(self.fold.distinct, right)
        with self.lock:
            self.parts.append((a, b))
            self.total += int((self.fold.count[a] * self.fold.count[b]).sum())
            self._refuse_excess()

    def unfold(self) -> IntArray:
        """Turn pairs of distinct values into all pairs of positions, ascending."""
        fold = self.fold
        many = np.flatnonzero(fold.count > 1)
        parts = [(many, many), *self.parts]
        self.parts = []
        a, b = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        sizes = fold.count[a] * fold.count[b]
        which = np.repeat(np.arange(len(a)), sizes)
        rest = np.arange(len(which)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        i, j = np.divmod(rest, fold.count[b][which])
        i = fold.order[fold.start[a][which] + i]
        j = fold.order[fold.start[b][which] + j]
        keep = (i < j) | (a != b)[which]  # within one value both orders came up
        i, j = i[keep], j[keep]
        return _ascending(np.stack([np.minimum(i, j), np.maximum(i, j)], axis=1), len(fold.order))

    def _refuse_excess(self) -> None:
        if self.total > self.limit:
            raise PlanError(
                f"pairs_within: {self.total:,} pairs or more, beyond the {self.limit:,} that memory_gb allows; "
                f"the largest group of equal hashes has {int(self.fold.count.max()):,}: use edges_within, whose "
                "components are the same, or raise memory_gb"
            )


class _Forest:
    """Keeps the minimum spanning forest of the matches under (distance, i, j)."""

    def __init__(self, fold: _Fold, limit: int) -> None:
        self.fold, self.limit = fold, limit
        self.lock = threading.Lock()
        self.parts: list[IntArray] = []
        self.distances: list[npt.NDArray[np.uint8]] = []
        self.held = 0

    def take(self, left: HashArray, right: HashArray) -> None:
        """Add matches between distinct values."""
        i, j = self.fold.first(left), self.fold.first(right)
        pairs = np.stack([np.minimum(i, j), np.maximum(i, j)], axis=1)
        with self.lock:
            self.parts.append(pairs)
            self.distances.append(np.bitwise_count(left ^ right))
            self.held += len(pairs)
            if self.held > self.limit:
                self.fold_away()
                self.limit = max(self.limit, 2 * self.held)  # a forest that fills the buffer would be folded each time

    def fold_away(self) -> IntArray:
        """Reduce what is held to the forest, and return it."""
        if not self.parts:
            return np.empty((0, 2), np.int64)
        pairs, distance = np.concatenate(self.parts), np.concatenate(self.distances)
        forest = spanning_forest(pairs, distance)
        self.parts, self.distances, self.held = [pairs[forest]], [distance[forest]], len(forest)
        return self.parts[0]


def _match(distinct: HashArray, radius: int, sink: _AllPairs | _Forest, threads: int | None) -> None:
    """Send every pair of distinct values within the radius to the sink, once, tables in parallel."""
    if radius == 0 or len(distinct) < 2:
        return
    tables = plan_tables(distinct, radius)
    if not len(tables):
        for match in _all_with_all(distinct, radius):
            sink.take(*match)
        return

    def work(table: int) -> None:
        for match in _table_matches(distinct, tables, table, 0):
            sink.take(*match)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(tables), threads or cores)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, table) for table in range(len(tables))]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _matches(values: HashArray, radius: int, depth: int) -> Iterator[Match]:
    """Yield every pair of distinct values within the radius once; for the long runs inside a table."""
    tables = None if len(values) <= SMALL or depth >= MAX_DEPTH else plan_tables(values, radius)
    if tables is None or not len(tables):
        yield from _all_with_all(values, radius)
        return
    for table in range(len(tables)):
        yield from _table_matches(values, tables, table, depth)


def _table_matches(values: HashArray, tables: Tables, table: int, depth: int) -> Iterator[Match]:
    """Yield the pairs within the radius that belong to this table."""
    permuted = tables.permute(values, table)
    permuted.sort()
    shift = np.uint64(64 - tables.key_bits(table))
    for start, stop in _chunks(permuted, shift):
        for left, right in _in_runs(permuted[start:stop], shift, tables.radius, depth):
            a, b = tables.restore(left, table), tables.restore(right, table)
            mine = tables.owned(a, b, table)
            if mine.any():
                yield a[mine], b[mine]


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


def _in_runs(chunk: HashArray, shift: np.uint64, radius: int, depth: int) -> Iterator[Match]:
    """Yield the pairs within the radius in every run of one key (and, rarely, some across runs)."""
    keys = chunk >> shift
    edges = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1], True])
    runs = np.diff(edges)
    if (long := runs > LONG_RUN).any():
        for run in np.flatnonzero(long):
            yield from _matches(chunk[edges[run] : edges[run + 1]], radius, depth + 1)
        short = np.repeat(~long, runs)
        chunk, keys, runs = chunk[short], keys[short], runs[~long]
    if len(runs) and (longest := int(runs.max())) > 1:
        sizes = np.bincount(runs, minlength=longest + 1)
        at_least = np.cumsum(sizes[::-1])[::-1]  # runs of this length or more
        active = np.cumsum(at_least[::-1])[::-1]  # rows whose run reaches at least this far, the row included
        yield from _sweep(chunk, keys, radius, active)


def _sweep(chunk: HashArray, keys: HashArray, radius: int, active: npt.NDArray[np.int64]) -> Iterator[Match]:
    """Compare each row with the rows `offset` further, for every offset that some run reaches."""
    found: list[Match] = []
    held = 0
    rows: npt.NDArray[np.int64] | None = None
    for offset in range(1, len(active) - 1):
        if active[offset + 1] >= DENSE * len(chunk):
            hit = np.flatnonzero(np.bitwise_count(chunk[offset:] ^ chunk[:-offset]) <= radius)
        else:
            if rows is None:
                rows = np.flatnonzero(keys[offset:] == keys[:-offset])
            else:
                rows = rows[: np.searchsorted(rows, len(chunk) - offset)]
                rows = rows[keys[rows] == keys[rows + offset]]
            hit = rows[np.bitwise_count(chunk[rows] ^ chunk[rows + offset]) <= radius]
        if len(hit):
            found.append((chunk[hit], chunk[hit + offset]))
            held += len(hit)
        if held >= MATCHES:
            yield _joined(found)
            found, held = [], 0
    if found:
        yield _joined(found)


def _all_with_all(values: HashArray, radius: int) -> Iterator[Match]:
    one_run = np.zeros(len(values), np.uint64)
    active = np.arange(len(values) + 1, 0, -1)
    yield from _sweep(values, one_run, radius, active)


def _joined(found: list[Match]) -> Match:
    return np.concatenate([match[0] for match in found]), np.concatenate([match[1] for match in found])

"""All pairs of 64-bit hashes within a Hamming radius: exact, in memory that is bounded and stated.

Block permutation (Manku, Jain, Das Sarma, WWW 2007) over the tables of `hamming_tables`, worked by `hamming_match`.
Three things keep it near-linear on what the web holds:

- equal hashes (blank images, placeholders) are folded into one before anything is compared;
- long runs of nearly equal hashes are planned again, and what is connected already is not compared for components;
- matches go to a sink that bounds memory: `pairs_within` refuses when the list of pairs cannot fit, `edges_within`
  keeps only edges that hold the components together.

Hashes whose pairs among themselves are known are compared with the fresh ones only. It knows nothing of images, keys
or files.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import numpy.typing as npt

from curate.dedup.components import spanning_forest
from curate.dedup.hamming_match import Match, between, between_table, is_crowded, join_neighbours, within, within_table
from curate.dedup.hamming_tables import HashArray, Tables, plan_tables
from curate.errors import PlanError

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

MAX_RADIUS = 10
# Peak per pair while the list is unfolded and sorted: tracemalloc saw 103 (equal hashes) to 128 (all different).
BYTES_PER_PAIR = 128


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
    _match(fold.distinct, np.ones(len(fold.distinct), np.bool_), radius, sink, threads)
    return sink.unfold()


def edges_within(
    hashes: HashArray, radius: int, *,
    fresh: BoolArray | None = None, memory_gb: float = 4.0, threads: int | None = None,
) -> tuple[IntArray, int]:  # fmt: skip
    """Find edges with the components of `pairs_within`, and at most N - 1 of them.

    Args:
        hashes: uint64[N].
        radius: 0 … 10.
        fresh: bool[N]; pairs of hashes that are not fresh are known, and are neither compared nor reported (but equal
            hashes always are). Default: all are fresh.
        memory_gb: what edges may take before they are folded into a forest.
        threads: as in `pairs_within`.

    Returns:
        (int64[M, 2], how many pairs of different hashes were compared): positions i < j, each a true pair, ascending;
        equal hashes hang on their first one. Which near pairs are chosen depends on the hashes alone.

    Raises:
        PlanError: wrong dtype, shape or radius.
    """
    _check(hashes, radius)
    fold = _Fold(hashes)
    sink = _Forest(fold, max(1 << 16, int(memory_gb * 1e9 / BYTES_PER_PAIR)))
    compared = _match(fold.distinct, fold.fresh(fresh), radius, sink, threads)
    return _ascending(np.concatenate([fold.stars(), sink.fold_away()]), len(hashes)), compared


def edges_in_table(
    hashes: HashArray, tables: Tables, table: int, *, fresh: BoolArray | None = None
) -> tuple[IntArray, int]:
    """Find one table's share of the edges, for hashes that were partitioned by that table's key.

    Over all tables, and over all partitions of each, the components are those of all pairs; equal hashes hang on their
    first one, in table 0 only. `hashes` must hold all that share a key with any of them.

    Args:
        hashes: uint64[N] as given (not permuted).
        tables: the plan, the same for the whole corpus.
        table: which of its tables.
        fresh: as in `edges_within`.

    Returns:
        As `edges_within`; different hashes are named by their first position.

    Raises:
        PlanError: wrong dtype or shape, no such table, or more pairs than 4 GB hold.
    """
    _check(hashes, tables.radius)
    if not 0 <= table < len(tables):
        raise PlanError(f"edges_in_table: table is {table}; the plan has {len(tables)} tables")
    fold = _Fold(hashes)
    sink = _Forest(fold, int(4e9 / BYTES_PER_PAIR))
    rounds, compared = _rounds(fold.distinct, fold.fresh(fresh), tables, sink)
    compared += _work(rounds, tables, table, sink)
    stars = fold.stars() if table == 0 else np.empty((0, 2), np.int64)
    return _ascending(np.concatenate([stars, sink.fold_away()]), len(hashes)), compared


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

    def fresh(self, rows: BoolArray | None) -> BoolArray:
        """Tell which values have fresh rows only; None: all rows are fresh."""
        if rows is None or not len(self.start):
            return np.ones(len(self.start), np.bool_)
        return np.logical_and.reduceat(rows[self.order], self.start)

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

    joined = False

    def __init__(self, fold: _Fold, limit: int) -> None:
        self.fold, self.limit = fold, limit
        self.lock = threading.Lock()
        self.parts: list[tuple[IntArray, IntArray]] = []
        self.total = sum(int(c) * (int(c) - 1) // 2 for c in fold.count[fold.count > 1])
        self._refuse_excess()

    def take(self, left: HashArray, right: HashArray, compared: int) -> int:
        """Add matches between distinct values; returns `compared`."""
        a, b = np.searchsorted(self.fold.distinct, left), np.searchsorted(self.fold.distinct, right)
        with self.lock:
            self.parts.append((a, b))
            self.total += int((self.fold.count[a] * self.fold.count[b]).sum())
            self._refuse_excess()
        return compared

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

    joined = True

    def __init__(self, fold: _Fold, limit: int) -> None:
        self.fold, self.limit = fold, limit
        self.lock = threading.Lock()
        self.parts: list[IntArray] = []
        self.distances: list[npt.NDArray[np.uint8]] = []
        self.held = 0

    def take(self, left: HashArray, right: HashArray, compared: int) -> int:
        """Add matches between distinct values; returns `compared`."""
        i, j = self.fold.first(left), self.fold.first(right)
        pairs = np.stack([np.minimum(i, j), np.maximum(i, j)], axis=1)
        with self.lock:
            self.parts.append(pairs)
            self.distances.append(np.bitwise_count(left ^ right))
            self.held += len(pairs)
            if self.held > self.limit:
                self.fold_away()
                self.limit = max(self.limit, 2 * self.held)  # a forest that fills the buffer would be folded each time
        return compared

    def fold_away(self) -> IntArray:
        """Reduce what is held to the forest, and return it."""
        if not self.parts:
            return np.empty((0, 2), np.int64)
        pairs, distance = np.concatenate(self.parts), np.concatenate(self.distances)
        forest = spanning_forest(pairs, distance)
        self.parts, self.distances, self.held = [pairs[forest]], [distance[forest]], len(forest)
        return self.parts[0]


Sink = _AllPairs | _Forest
Round = tuple[HashArray, HashArray, bool]


def _match(distinct: HashArray, fresh: BoolArray, radius: int, sink: Sink, threads: int | None) -> int:
    """Send every pair of distinct values within the radius to the sink, tables in parallel; returns how many compared.

    Pairs without a fresh value are left out, and for a forest those that are connected already.
    """
    if radius == 0 or not fresh.any() or len(distinct) < 2:
        return 0
    tables = plan_tables(distinct, radius, pairs=_pairs([(distinct[fresh], distinct[~fresh], True)]))
    rounds, compared = _rounds(distinct, fresh, tables, sink)
    if compared:
        new = np.concatenate([new for new, _, _ in rounds])
        tables = plan_tables(new, radius, n=len(distinct), pairs=_pairs(rounds))
    if not len(tables):
        for new, known, inner in rounds:
            found = [within(new, radius, joined=sink.joined)] if inner else []
            compared += _sent(chain(*found, between(new, known, radius, joined=sink.joined)), sink)
        return compared
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(len(tables), threads or cores)) as pool:
        futures = [pool.submit(_work, rounds, tables, table, sink) for table in range(len(tables))]
        try:
            return compared + sum(future.result() for future in futures)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _rounds(distinct: HashArray, fresh: BoolArray, tables: Tables, sink: Sink) -> tuple[list[Round], int]:
    """What must be compared with what (new values, others, whether the new ones among themselves too).

    Where a forest is asked for and the hashes are crowded, the crowd is joined first (returns how many that compared),
    and its pairs are left out.
    """
    if not sink.joined or not is_crowded(distinct, tables):
        return [(distinct[fresh], distinct[~fresh], True)], 0
    edges, inside = join_neighbours(distinct, tables.radius)
    new = fresh & ~inside
    return [(distinct[new], distinct[~new], True), (distinct[fresh & inside], distinct[~fresh & ~inside], False)], (
        sink.take(*edges)
    )


def _pairs(rounds: list[Round]) -> float:
    """How many pairs these rounds ask about."""
    return float(sum(len(new) * (len(known) + inner * (len(new) - 1) / 2) for new, known, inner in rounds))


def _work(rounds: list[Round], tables: Tables, table: int, sink: Sink) -> int:
    """A table's share of the rounds."""
    compared = 0
    for new, known, inner in rounds:
        if inner:
            compared += _sent(within_table(new, tables, table, joined=sink.joined), sink)
        if len(new) and len(known):
            compared += _sent(between_table(new, known, tables, table, joined=sink.joined), sink)
    return compared


def _sent(found: Iterator[Match], sink: Sink) -> int:
    return sum(sink.take(*match) for match in found)

"""Recall of a vector search, measured by every run: a sample of rows against all rows of the pool.

A true pair (a sampled row and any row whose cosine reaches the threshold) counts as found when the search put both into
one group; for SemDeDup, which compares inside its cells only, when either was removed. Sampled rows of equal bytes
count once, and of one group FEW at most: a crowd that is half of the pool would else be half of the sample, each of it
with half of the pool to decide. A sample of 1,024 rows costs as much as a cell of that many rows for each row of the
pool: about a tenth of the search at a million rows.
"""

from functools import partial

import numpy as np
import numpy.typing as npt

from curate.dedup.cells import Recall
from curate.dedup.cosine import cross_above
from curate.dedup.near import IntArray, Pool
from curate.dedup.near_vectors import VectorSearch
from curate.stage import Map
from curate.vectors import chunks_of, finish, get_arrays

FEW = 4  # sampled rows of one group: a crowd of a million rows is then four million pairs to decide, ten seconds


def measure_pool(pool: Pool, search: VectorSearch, map_items: Map) -> Recall:
    """The counts over all shards, after `group_near`. What is there already is not measured again."""
    chunks = chunks_of(len(pool.names), search.shards_per_chunk)
    done = set(pool.store.names(pool.place("recall")))
    finish(map_items(partial(_measure, pool, search), [c for c in chunks if f"{c.start:08d}.json" not in done]))
    counts = [pool.store.get_json(pool.place(f"recall/{name}")) for name in pool.store.names(pool.place("recall"))]
    rows = int(_few_of_each(pool).sum())
    return Recall(rows, sum(count["true"] for count in counts), sum(count["found"] for count in counts))


def _measure(pool: Pool, search: VectorSearch, chunk: range) -> None:
    few = _few_of_each(pool)
    sample = {name: values[few] for name, values in get_arrays(pool.store, pool.place("sample.npz")).items()}
    near = get_arrays(pool.store, pool.place("near.npz"))
    true = found = 0
    for number in chunk:
        vectors, rows = pool.values(pool.names[number])
        rows = rows + pool.starts[number]
        hits, cosine = cross_above(sample["vector"], vectors, search.threshold)
        if search.form != "threshold":
            hits = hits[cosine > np.float32(search.threshold)]
        left, right = sample["row"][hits[:, 0]], rows[hits[:, 1]]
        mine = (left < right) | ((left > right) & ~np.isin(right, sample["row"]))  # with both sampled: once
        left, right = left[mine], right[mine]
        true += len(left)
        if search.grouped:
            here, there = _group(near["row"], near["group"], left), _group(near["row"], near["group"], right)
            found += int((here == there).sum())
        else:
            found += int((np.isin(left, near["row"]) | np.isin(right, near["row"])).sum())
    pool.store.put_json(pool.place(f"recall/{chunk.start:08d}.json"), {"true": true, "found": found})


def _few_of_each(pool: Pool) -> npt.NDArray[np.bool_]:
    """Which sampled rows are measured."""
    near = get_arrays(pool.store, pool.place("near.npz"))
    group = _group(near["row"], near["group"], get_arrays(pool.store, pool.place("sample.npz"))["row"])
    order = np.argsort(group, kind="stable")
    start = np.searchsorted(group[order], group[order])
    few = np.zeros(len(group), np.bool_)
    few[order] = np.arange(len(group)) - start < FEW
    return few


def _group(row: IntArray, group: IntArray, asked: IntArray) -> IntArray:
    """The group of each asked row; itself where it has no edge."""
    if not len(row):
        return asked
    at = np.searchsorted(row, asked).clip(max=len(row) - 1)
    return np.where(row[at] == asked, group[at], asked)

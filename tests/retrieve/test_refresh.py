"""A pool that grows: its cells are extended, not made again, and all is as from scratch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curate.config import CellsSettings, HierarchySettings, RetrieveSettings, SeedSet
from curate.retrieve import cells as kernels
from curate.retrieve.step import CellsStep, cells_step, hierarchy_step, retrieve_step
from curate.schema import KEY, Shard, TableSpec, pool_digest
from curate.stage import CrossStep
from curate.store import Store
from curate.vectors import founders, key_numbers
from tests.retrieve.pool import TABLES, WIDTH, Row, build, go, rows_of, shuffled_map
from tests.retrieve.test_step import _tree

L2 = CellsSettings(by="toy", count=8, metric="l2", points_per_cell=20, where="NOT is_duplicate")
SETS = [
    SeedSet(name="near", how="sample", where="folder = 'b'", k=3, nprobe=3),
    SeedSet(name="cells", how="cluster", where="folder = 'c'", per_cell=9, cap=20),
]


class Work:
    """How often k-means was trained, and how many shards were assigned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained = self.assigned = 0
        train, assign = kernels.train, kernels.assign

        def counting_train(*args: Any) -> kernels.Cells:
            self.trained += 1
            return train(*args)

        def counting_assign(*args: Any) -> Iterator[Any]:
            self.assigned += 1
            return assign(*args)

        monkeypatch.setattr(kernels, "train", counting_train)
        monkeypatch.setattr(kernels, "assign", counting_assign)

    def since(self, before: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """(trained, assigned) beyond what was counted before."""
        return self.trained - before[0], self.assigned - before[1]


def _flags(store: Store, shards: list[Shard], rows: list[Row]) -> TableSpec:
    """Which rows are copies, as dedup has it: other rows of the same shard in each pool."""
    schema = pa.schema([KEY, pa.field("is_duplicate", pa.bool_())])
    spec = TableSpec("duplicates", 1, schema, {"pool": pool_digest(shards)})
    start = 0
    for shard in shards:
        keys = [row.key for row in rows[start : start + shard.rows]]
        flags = key_numbers(keys) % np.uint64(len(shards)) == 0
        store.write(spec, shard, pa.table([pa.array(keys), pa.array(flags)], schema=schema), TABLES[0])
        start += shard.rows
    return spec


def _steps(store: Store, shards: list[Shard], rows: list[Row]) -> list[CrossStep]:
    cells = cells_step(L2, store, [*TABLES, _flags(store, shards, rows)], shards)
    retrieve = retrieve_step(RetrieveSettings(sets=SETS, recall_seeds=5), cells)
    return [cells, retrieve, hierarchy_step(HierarchySettings(targets=[50]), cells)]


def test_a_refresh_assigns_new_shards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards "built once, extended by a refresh": k-means of yesterday's founders, old shards that nobody assigns again
    though the condition now leaves out others of their rows, and the bytes of a run from scratch."""
    store = Store(str(tmp_path / "grown"))
    shards, rows = build(store, shards=7)
    work = Work(monkeypatch)
    first = _steps(store, shards[:4], rows)[0]
    go(first, store, shards[:4], shuffled_map)
    assert work.since() == (1, 4)
    before = _tree(tmp_path / "grown" / "cells")

    for step in (grown := _steps(store, shards[:6], rows)):
        done = work.since()
        go(step, store, shards[:6], shuffled_map)
        if step is grown[0]:
            assert work.since(done) == (0, 2)
    assert grown[0].tables[0].fingerprint == first.tables[0].fingerprint
    after = _tree(tmp_path / "grown" / "cells")
    assert {name: after[name] for name in before} == before and len(after) == 6

    whole, done = _tree(tmp_path / "grown"), work.since()
    for step in _steps(store, shards[:6], rows):
        assert step.done(store, shards[:6])
        assert go(step, store, shards[:6]) == {}
    assert work.since(done) == (0, 0) and _tree(tmp_path / "grown") == whole

    other = Store(str(tmp_path / "scratch"))
    build(other, shards=7)
    for step in _steps(other, shards[:6], rows):
        go(step, other, shards[:6])
    scratch = _tree(tmp_path / "scratch")
    assert {name: whole[name] for name in scratch} == scratch


def test_cells_are_trained_anew_once_a_pool_has_doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against cells of the first thousand rows in a pool of millions."""
    store = Store(str(tmp_path))
    shards, rows = build(store, shards=7)
    work = Work(monkeypatch)
    go(_steps(store, shards[:6], rows)[0], store, shards[:6])
    go(_steps(store, shards, rows)[0], store, shards)
    assert work.since() == (2, 6 + 7)
    counts = [10, 100, 1, 17, 1]
    pool = [Shard(str(number), count) for number, count in enumerate(counts)]
    assert [len(founders(pool[:count])) for count in range(6)] == [0, 1, 2, 2, 4, 4]


def test_the_condition_says_who_is_counted_searched_and_sampled(tmp_path: Path) -> None:
    """Guards against copies that are retrieved or sampled because they have a cell."""
    store = Store(str(tmp_path))
    shards, rows = build(store)
    steps = _steps(store, shards, rows)
    for step in steps:
        go(step, store, shards)
    copies = key_numbers([row.key for row in rows]) % np.uint64(5) == 0
    cells, retrieved, sampled = (rows_of(store, step.tables[0], shards) for step in steps)
    held = [at for at, row in enumerate(cells) if row["cell"] is not None]
    assert set(held) == {at for at, row in enumerate(rows) if row.vector is not None and row.vector.any()}
    assert any(copies[held])
    assert not any(copies[at] for at, row in enumerate(retrieved) if row["is_retrieved"])
    assert not any(copies[at] for at, row in enumerate(sampled) if row["hierarchical_sample_50"])
    assert isinstance(steps[0], CellsStep)
    assert store.get_json(steps[0].facts)["rows"] == sum(not copies[at] for at in held)


def test_ready_centroids_hold_whatever_the_pool_grows_to(tmp_path: Path) -> None:
    """Guards against a refresh that assigns the old pool again."""
    store = Store(str(tmp_path / "run"))
    shards, rows = build(store)
    file = tmp_path / "centroids.npy"
    np.save(file, np.random.default_rng(0).normal(size=(6, WIDTH)).astype(np.float32))
    settings = CellsSettings(by="toy", count=6, metric="l2", centroids=str(file), where="folder <> 'a'")
    prints, trees = set(), []
    for count in (1, 5):
        step = cells_step(settings, store, TABLES, shards[:count])
        go(step, store, shards[:count])
        prints.add(step.tables[0].fingerprint)
        trees.append(_tree(tmp_path / "run" / "cells"))
    assert len(prints) == 1
    assert {name: trees[1][name] for name in trees[0]} == trees[0] and len(trees[1]) == 5
    found = rows_of(store, step.tables[0], shards)
    counted = [row for row, told in zip(rows, found, strict=True) if told["cell"] is not None and row.folder != "a"]
    assert store.get_json(step.facts)["rows"] == len(counted) > 100

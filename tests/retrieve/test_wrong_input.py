"""What people write and hand over by mistake: an error that says what to change, or a sound result."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from curate.config import HierarchySettings, LevelSettings, RetrieveSettings, SeedSet, parse_recipe
from curate.engine.job import Job
from curate.errors import PlanError
from curate.report.terminal import print_plan
from curate.retrieve.step import cells_step, hierarchy_step, retrieve_step
from curate.store import Store
from tests.retrieve.pool import TABLES, WIDTH, build, go
from tests.retrieve.test_step import CELLS, _cells, _usable


@pytest.mark.parametrize(
    ("update", "words"),
    [({"by": "nope"}, "no column of vectors"), ({"by": "folder"}, "toy"), ({"where": "nope > 1"}, "cells.where"),
     ({"centroids": "/nowhere.npy"}, "cannot be read")],
)  # fmt: skip
def test_wrong_cells_are_refused_in_the_plan(tmp_path: Path, update: dict[str, Any], words: str) -> None:
    """Guards against settings that fail after a night of scoring."""
    with pytest.raises(PlanError, match=words):
        cells_step(CELLS.model_copy(update=update), Store(str(tmp_path)), TABLES, [])


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.npy", b"", "neither .npy nor .npz"), ("a.npz", b"PK\3\4", "neither .npy nor .npz"),
        ("a.npy", np.ones((3, WIDTH), int), "matrix of floats"), ("a.npy", np.ones(WIDTH), "matrix of floats"),
        ("a.npy", np.ones((0, WIDTH)), "no seed has a usable"),
        ("a.npy", np.full((3, WIDTH), np.nan), "no seed has a usable"), ("a.parquet", b"PAR1", "no whole Parquet"),
        ("a.parquet", [["a"] * WIDTH], "no vectors"), ("a.parquet", [[1.0], [1.0, 2.0]], "not all of one length"),
        ("a.parquet", pa.array([None, None], pa.list_(pa.float32())), "no seed has a usable"),
        ("a.parquet", [{"a": 1.0}], "no vectors"),
    ],
)  # fmt: skip
def test_broken_files_of_seeds_are_plan_errors(tmp_path: Path, name: str, data: Any, words: str) -> None:
    """Guards against a traceback of NumPy or Arrow where a person needs the file's name."""
    store = Store(str(tmp_path / "run"))
    shards, _ = build(store, shards=2)
    path = tmp_path / name
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif isinstance(data, np.ndarray):
        np.save(path, data)
    else:
        pq.write_table(pa.table({"v": data}), path)
    settings = RetrieveSettings(sets=[SeedSet(name="set", how="sample", embeddings=str(path))])
    cells = _cells(store, shards)
    with pytest.raises(PlanError, match=words):
        go(retrieve_step(settings, cells), store, shards)


def test_odd_but_usable_seeds_and_pools(tmp_path: Path) -> None:
    """Guards against another machine's byte order, k and nprobe beyond the pool, repeated seeds, a pool of one row, and
    centroids without a direction."""
    store = Store(str(tmp_path / "run"))
    shards, rows = build(store, shards=2)
    cells = _cells(store, shards)
    seeds = np.repeat(_usable(rows)[1][:1], 3, axis=0)
    np.save(tmp_path / "seeds.npy", seeds.astype(">f4"))
    one = SeedSet(name="set", how="sample", embeddings=str(tmp_path / "seeds.npy"), k=5000, nprobe=5000)
    many = len(_usable(rows)[0])
    for codes in (None, "SQ8"):
        step = retrieve_step(RetrieveSettings(sets=[one], codes=codes), cells)
        go(step, store, shards)
        (line,) = (step.report(store) or {})["sets"]
        assert (line["seeds"], line["retrieved"], line["different_images"], line["recall"]) == (3, 3 * many, many, 1.0)

    alone = Store(str(tmp_path / "alone"))
    shard, _ = build(alone, shards=1, rows=1)
    single = _cells(alone, shard, CELLS.model_copy(update={"count": 1}))
    step = retrieve_step(RetrieveSettings(sets=[one]), single)
    go(step, alone, shard)
    assert (step.report(alone) or {})["different_images"] == 1

    np.save(tmp_path / "zero.npy", np.zeros((2, WIDTH), np.float32))
    ready = CELLS.model_copy(update={"count": 2, "centroids": str(tmp_path / "zero.npy")})
    assert store.get_json(_cells(store, shards, ready).facts)["largest_radius"] == 1.0


def test_pools_too_small_for_their_settings_are_refused(tmp_path: Path) -> None:
    """Guards against an error of FAISS, or an empty list, where a person needs to know what to change."""
    store = Store(str(tmp_path / "run"))
    shards, _ = build(store, shards=1, rows=8)
    with pytest.raises(PlanError, match="9 cells asked of 8"):
        _cells(store, shards, CELLS.model_copy(update={"count": 9}))
    own = RetrieveSettings(sets=[SeedSet(name="set", how="sample", where="folder IS NOT NULL")])
    cells = _cells(store, shards, CELLS.model_copy(update={"count": 2}))
    with pytest.raises(PlanError, match="search a small pool without codes"):
        go(retrieve_step(own.model_copy(update={"codes": "PQ4"}), cells), store, shards)
    nobody = _cells(store, shards, CELLS.model_copy(update={"count": 2, "where": "folder = 'z'"}))
    with pytest.raises(PlanError, match=r"check `cells\.where`"):
        go(retrieve_step(own, nobody), store, shards)


def test_wrong_seeds_are_refused(tmp_path: Path) -> None:
    """Guards against seeds of another model, or of no model, that retrieve noise."""
    store = Store(str(tmp_path / "run"))
    shards, _ = build(store)
    cells = _cells(store, shards)
    np.save(tmp_path / "wide.npy", np.ones((3, WIDTH + 1), np.float32))
    wide = SeedSet(name="set", how="sample", embeddings=str(tmp_path / "wide.npy"))
    lists = tmp_path / "wide.parquet"
    pq.write_table(pa.table({"v": [[1.0] * (WIDTH + 1)]}), lists)
    with pytest.raises(PlanError, match="embed both by one model"):  # in the plan
        retrieve_step(RetrieveSettings(sets=[wide]), cells)
    late = wide.model_copy(update={"embeddings": str(lists)})  # plain lists say their width only when they are read
    with pytest.raises(PlanError, match="embed both by one model"):
        go(retrieve_step(RetrieveSettings(sets=[late]), cells), store, shards)
    for one in (SeedSet(name="set", how="sample", embeddings="/no.npy"), SeedSet(name="set", how="cluster", where="x")):
        with pytest.raises(PlanError, match=r"retrieve\.sets\.set"):
            retrieve_step(RetrieveSettings(sets=[one]), cells)
    none = SeedSet(name="set", how="cluster", where="folder = 'z'")
    with pytest.raises(PlanError, match="no seed has a usable vector"):
        go(retrieve_step(RetrieveSettings(sets=[none]), cells), store, shards)
    with pytest.raises(PlanError, match=r"metric: l2"):
        hierarchy_step(HierarchySettings(targets=[3]), cells)


def test_k_means_takes_no_more_memory_than_it_was_given(tmp_path: Path) -> None:
    """Guards against a task of 157 GB that a machine kills after a week of scoring: fewer points are seen and the plan
    says so, and what no number of points would fit is refused there."""
    store = Store(str(tmp_path / "run"))
    shards, _ = build(store)
    cells = cells_step(CELLS, store, TABLES, shards)
    bytes_of = 1e-9 * CELLS.count * WIDTH
    tight = CELLS.model_copy(update={"memory_gb": bytes_of * (12 + 8 * 7)})
    less = cells_step(tight, store, TABLES, shards)
    assert (cells.note, cells.points_per_cell, less.points_per_cell) == ("", 20, 7) and "sees 7 points" in less.note
    seven = cells_step(CELLS.model_copy(update={"points_per_cell": 7}), store, TABLES, shards)
    prints = [one.tables[0].fingerprint for one in (cells, less, seven)]
    assert prints[0] != prints[1] == prints[2]
    plan = {"root": store.root, "ingest": {"sources": ["none"]}, "engine": {"driver": "inline"}}
    job, told = Job(parse_recipe(plan), dry=True), io.StringIO()
    job.shards = shards
    job.across(less)
    print_plan(Console(file=told, width=200), job)
    assert less.note in told.getvalue()
    go(less, store, shards)
    with pytest.raises(PlanError, match="raise memory_gb"):
        cells_step(CELLS.model_copy(update={"memory_gb": bytes_of}), store, TABLES, shards)
    wide = tight.model_copy(update={"resampling": 1, "sample_size": 8})
    with pytest.raises(PlanError, match="7 would fit"):
        cells_step(wide, store, TABLES, shards)
    l2 = cells_step(CELLS.model_copy(update={"metric": "l2"}), store, TABLES, shards)
    tree = HierarchySettings(levels=[LevelSettings(count=4)], targets=[9], memory_gb=4e-9 * WIDTH * (12 + 8 * 2))
    step = hierarchy_step(tree, l2)
    assert "4 clusters sees 2 points for each, not 256" in step.note
    go(l2, store, shards)
    assert go(step, store, shards) == {"hierarchical_sample_9": 9}


def test_numbers_beyond_the_pool_cost_nothing(tmp_path: Path) -> None:
    """Guards against a failed allocation of terabytes, where `k`, `nprobe`, `rerank` or `per_cell` say "all" by a
    large number."""
    store = Store(str(tmp_path / "run"))
    shards, rows = build(store, shards=2)
    cells, many = _cells(store, shards), len(_usable(rows)[0])
    huge = 10**30
    near = SeedSet(name="near", how="sample", where="folder = 'a'", k=huge, nprobe=huge)
    inside = SeedSet(name="inside", how="cluster", where="folder = 'a'", more_than=0, per_cell=huge, cap=huge)
    for codes in (None, "SQ8"):
        step = retrieve_step(RetrieveSettings(sets=[near, inside], codes=codes, rerank=huge), cells)
        go(step, store, shards)
        first, second = (step.report(store) or {})["sets"]
        assert first["retrieved"] == first["seeds"] * (many - 1) and first["recall"] == 1.0
        assert 0 < second["final"] <= many


@pytest.mark.parametrize("name", ["pool", "hits", "clusters", "searched", "codec"])
def test_sets_may_have_the_names_of_work_folders(tmp_path: Path, name: str) -> None:
    """Guards a set called `pool`, whose files lay among the pool's own and ended the run."""
    store = Store(str(tmp_path))
    shards, _ = build(store, shards=2)
    near = SeedSet(name=name, how="sample", where="folder = 'a'", k=2)
    inside = SeedSet(name="inside", how="cluster", where="folder = 'b'", more_than=0)
    step = retrieve_step(RetrieveSettings(sets=[near, inside]), _cells(store, shards))
    assert set(go(step, store, shards)) == {f"retrieved by {name}", "retrieved by inside"}


def test_damaged_and_unusual_files_of_seeds(tmp_path: Path) -> None:
    """Guards against torch's traceback for long doubles, an error of Arrow that names no file, Python's tokenizer over
    a damaged header, and an .npz with two arrays that is only noticed after a night of scoring."""
    store = Store(str(tmp_path / "run"))
    shards, _ = build(store, shards=2)
    cells = _cells(store, shards)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "long.npy", rng.normal(size=(3, WIDTH)).astype(np.longdouble))
    one = SeedSet(name="set", how="sample", embeddings=str(tmp_path / "long.npy"))
    step = retrieve_step(RetrieveSettings(sets=[one]), cells)
    go(step, store, shards)
    assert (step.report(store) or {})["sets"][0]["seeds"] == 3
    (tmp_path / "head.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((\n")
    pq.write_table(pa.table({"v": rng.normal(size=(50, WIDTH)).tolist()}), tmp_path / "page.parquet")
    page = bytearray((tmp_path / "page.parquet").read_bytes())
    page[20:60] = bytes(40)
    (tmp_path / "page.parquet").write_bytes(page)
    np.savez(tmp_path / "two.npz", a=np.ones((2, WIDTH)), b=np.ones((2, WIDTH)))
    for name, words in (
        ("head.npy", "neither .npy"),
        ("page.parquet", "page.parquet is no whole"),
        ("two.npz", "a, b"),
    ):
        wrong = RetrieveSettings(sets=[one.model_copy(update={"embeddings": str(tmp_path / name)})])
        with pytest.raises(PlanError, match=words):
            planned = retrieve_step(wrong, cells)
            assert name != "two.npz"
            go(planned, store, shards)


def test_centroids_of_their_own_are_checked(tmp_path: Path) -> None:
    """Guards against cells around nothing, where centroids that are NaN became zero, and against centroids of another
    model that are only noticed after a night of scoring."""
    store = Store(str(tmp_path / "run"))
    shards, _ = build(store, shards=2)
    np.save(tmp_path / "nan.npy", np.full((2, WIDTH), np.nan, np.float32))
    np.save(tmp_path / "wide.npy", np.ones((2, WIDTH + 1), np.float32))
    ready = CELLS.model_copy(update={"count": 2, "centroids": str(tmp_path / "nan.npy")})
    with pytest.raises(PlanError, match="not finite"):
        _cells(store, shards, ready)
    with pytest.raises(PlanError, match="embed both by one model"):
        cells_step(ready.model_copy(update={"centroids": str(tmp_path / "wide.npy")}), store, TABLES, shards)


def test_wrong_hierarchies_are_refused(tmp_path: Path) -> None:
    """Guards against a level larger than the one below that is only noticed after k-means, draws that never end, an
    overflow, and a sample of nothing that nobody notices."""
    store = Store(str(tmp_path))
    shards, _ = build(store, shards=2)
    l2 = CELLS.model_copy(update={"metric": "l2"})
    cells = cells_step(l2, store, TABLES, shards)
    for update, words in (
        ({"levels": [LevelSettings(count=11)]}, r"\[10, 11\] clusters"),
        ({"splits": 2, "levels": [LevelSettings(count=4), LevelSettings(count=5)]}, r"\[20, 4, 5\] clusters"),
        ({"multiplier": 10**7}, "multiplier may be up to 10,000"), ({"targets": [10**30]}, "below 2"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=words):
            hierarchy_step(HierarchySettings(**{"targets": [9]} | update), cells)  # type: ignore[arg-type]
    nobody = _cells(store, shards, l2.model_copy(update={"where": "folder = 'z'"}))
    with pytest.raises(PlanError, match=r"check `cells\.where`"):
        go(hierarchy_step(HierarchySettings(targets=[9]), nobody), store, shards)

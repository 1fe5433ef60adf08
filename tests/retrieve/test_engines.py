"""Cells, retrieval, balanced sampling, balance and experts on Ray: the same bytes as in one process."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import pytest

import curate.vectors
from curate.balance.step import experts_step
from curate.config import (
    BalanceSettings,
    CellsSettings,
    ExpertsSettings,
    HierarchySettings,
    LevelSettings,
    RetrieveSettings,
    SeedSet,
    parse_recipe,
)
from curate.engine.driver import OnDevice
from curate.engine.job import Job
from curate.retrieve import cells as kernels
from curate.retrieve.step import cells_step, hierarchy_step, retrieve_step
from curate.schema import Shard
from curate.stage import CrossStep
from curate.store import Store
from tests.balance.test_step import balance_of
from tests.retrieve.pool import TABLES, WIDTH, build, go
from tests.retrieve.test_step import _tree

if TYPE_CHECKING:
    from curate.engine.ray import RayDriver

L2 = CellsSettings(by="toy", count=8, metric="l2", points_per_cell=20, resampling=1, sample_size=6)
TREE = HierarchySettings(splits=2, levels=[LevelSettings(count=3, resampling=1, sample_size=2)], targets=[50])
EXPERTS = ExpertsSettings(by="toy", fine=6, coarse=2, sample=90, fine_iterations=5, coarse_iterations=5)
Steps = Callable[[Store, list[Shard]], Iterator[CrossStep]]


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    """Every step of these two domains, over the small pool."""
    (tmp_path / "entries.txt").write_text("t1\nt2\nt3\nunseen\n")
    np.save(tmp_path / "seeds.npy", np.random.default_rng(5).normal(size=(40, WIDTH)).astype(np.float32))
    sets = [
        SeedSet(name="near", how="sample", embeddings=str(tmp_path / "seeds.npy"), k=3, nprobe=3),
        SeedSet(name="cells", how="cluster", embeddings=str(tmp_path / "seeds.npy"), more_than=3, per_cell=9, cap=20),
    ]

    def make(store: Store, shards: list[Shard]) -> Iterator[CrossStep]:
        cells = cells_step(L2, store, TABLES, shards)
        whole = cells_step(L2.model_copy(update={"resampling": 0, "batch": 40}), store, TABLES, shards)
        yield cells
        yield retrieve_step(RetrieveSettings(sets=sets, recall_seeds=9), cells)
        yield retrieve_step(RetrieveSettings(sets=sets, recall_seeds=9, codes="SQ8"), cells)
        yield whole
        yield hierarchy_step(TREE, whole)
        yield balance_of(BalanceSettings(entries=str(tmp_path / "entries.txt"), t=3), store, TABLES, shards)
        yield experts_step(EXPERTS, store, TABLES, shards)

    return make


def _run(root: Path, steps: Steps, mapper: Any) -> dict[str, str]:
    store = Store(str(root))
    shards, _ = build(store)
    for step in steps(store, shards):
        go(step, store, shards, mapper)
    return _tree(root)


def test_ray_and_one_process_write_the_same_bytes(
    tmp_path: Path, steps: Steps, ray_driver: "RayDriver", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards every pass against what a worker does not get: patched settings, an order of items, its own random state.
    Two workers beside one process, and other chunks."""
    expected = _run(tmp_path / "inline", steps, map)
    assert not any(name.startswith("_work") for name in expected)
    monkeypatch.setattr(curate.vectors, "SHARDS_PER_CHUNK", 2)  # the process that drives a step makes its items
    assert _run(tmp_path / "two", steps, ray_driver.map) == expected


def test_two_runs_at_one_root_end_alike(tmp_path: Path, steps: Steps) -> None:
    """Guards the work folders: one run sweeps what the other still reads, and what then is done is enough; the next run
    sweeps what the one that lost has left."""
    expected = _run(tmp_path / "alone", steps, map)
    store = Store(str(tmp_path / "both"))
    shards, _ = build(store)
    recipe = parse_recipe({"root": store.root, "ingest": {"sources": ["none"]}, "engine": {"driver": "inline"}})
    failures: list[Exception] = []

    def run() -> None:
        try:
            for step in steps(store, shards):
                job = Job(recipe)
                job.shards = shards
                job.across(step)
        except Exception as error:  # a thread's exception is lost otherwise
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step in steps(store, shards):  # as a run leaves it that goes on a moment after the other has swept
        store.put_json(f"_work/{step.tables[0].name}/{step.tables[0].fingerprint}/late.json", {})
    run()
    assert failures == []
    found = _tree(tmp_path / "both")
    assert {name: digest for name, digest in found.items() if not name.endswith("/_table.json")} == expected


def test_k_means_does_not_see_the_number_of_threads() -> None:
    """Guards "the same bytes on every engine": Ray gives a task one thread, a process has as many as cores."""
    points = np.random.default_rng(0).normal(size=(9000, 48)).astype(np.float16)
    before = faiss.omp_get_max_threads()
    found = []
    for threads in (1, 3):
        faiss.omp_set_num_threads(threads)
        found.append([kernels.train(points, 150, metric, iterations=5).centroids for metric in ("cosine", "l2")])
    faiss.omp_set_num_threads(before)
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def test_a_function_for_a_gpu_runs_where_there_is_none(ray_driver: "RayDriver") -> None:
    """Guards a cluster without GPUs: a task that asked for one would wait for ever."""
    assert sorted(ray_driver.map(OnDevice(abs), [-1, 2])) == [1, 2]

"""Stages over shards, on both engines: the same bytes, whatever dies."""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from curate.config import parse_recipe
from curate.engine.attempts import set_aside
from curate.engine.driver import Driver
from curate.engine.inline import InlineDriver
from curate.engine.job import Job
from curate.errors import StageError
from curate.metrics import Ticker
from curate.schema import Shard
from curate.stage import CrossStep, Map, Stage, Task, run_shard
from curate.store import Store
from tests.engine.toy import SAMPLES, ToyFetch, ToyScore, bytes_of, fill_pool


@pytest.fixture(params=["inline", "ray"])
def driver(request: pytest.FixtureRequest) -> Driver:
    """The same test on every engine."""
    return InlineDriver() if request.param == "inline" else request.getfixturevalue("ray_driver")


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    """An undisturbed run, stage by stage without any engine."""
    store = Store(str(tmp_path / "expected"))
    for shard in fill_pool(store):
        for stage in (ToyFetch(), ToyScore()):
            run_shard(store, stage, shard)
    return bytes_of(store)


def test_run_gives_the_same_bytes_on_every_engine(tmp_path: Path, driver: Driver, expected: dict[str, bytes]) -> None:
    """Guards against results that depend on the engine or on the order of completion."""
    store = Store(str(tmp_path / "root"))
    shards = fill_pool(store)
    reports = list(driver.run(store, [ToyFetch(), ToyScore()], shards))
    assert bytes_of(store) == expected
    assert sorted(report[0].shard for report in reports) == [shard.name for shard in shards]
    assert all(report[0].counts == {"ok": 478, "timeout": 122} for report in reports)


def test_second_run_computes_nothing(tmp_path: Path, driver: Driver) -> None:
    """Guards against work done twice, which on a cluster is money."""
    store = Store(str(tmp_path))
    shards = fill_pool(store)
    list(driver.run(store, [ToyFetch(), ToyScore()], shards))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    again = list(driver.run(store, [ToyFetch(), ToyScore()], shards))
    assert all(report.computed == () for reports in again for report in reports)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == times


def test_new_scorer_computes_only_its_own_table(tmp_path: Path, driver: Driver) -> None:
    """Guards against a new score that fetches or scores the pool again."""
    store = Store(str(tmp_path))
    shards = fill_pool(store, shards=2)
    list(driver.run(store, [ToyFetch(), ToyScore()], shards))
    reports = list(driver.run(store, [ToyFetch(), ToyScore("other")], shards))
    assert {report.computed for pair in reports for report in pair} == {(), ("scores_other",)}


def test_failing_shard_is_set_aside_with_its_cause_and_the_rest_go_on(tmp_path: Path, driver: Driver) -> None:
    """Guards against one bad shard that ends a run, and against a failure nobody can explain."""
    store = Store(str(tmp_path))
    shards = fill_pool(store)
    reports = list(driver.run(store, [ToyFetch(raises="0002"), ToyScore()], shards))
    aside = [report for pair in reports for report in pair if report.set_aside]
    assert [(report.stage, report.shard) for report in aside] == [("fetch", "0002")]
    assert aside[0].set_aside is not None
    assert "3 tries" in aside[0].set_aside
    assert "ValueError: this shard cannot be done" in aside[0].set_aside
    assert store.done(ToyScore().tables[0]) == {"0000", "0001", "0003"}
    assert set_aside(store, ToyFetch()) == {"0002": aside[0].set_aside}


@pytest.mark.parametrize("behind", [[ToyScore()], []], ids=["actors", "tasks"])
def test_shard_that_kills_its_worker_is_set_aside_after_three_tries(
    tmp_path: Path, ray_driver: Driver, behind: list[Stage]
) -> None:
    """Guards against a decoder crash that Ray would retry for ever, in actors and in tasks."""
    store = Store(str(tmp_path))
    shards = fill_pool(store)
    stages = [ToyFetch(poison="0001"), *behind]
    reports = list(ray_driver.run(store, stages, shards))
    aside = [report for pair in reports for report in pair if report.set_aside]
    assert [(report.stage, report.shard) for report in aside] == [("fetch", "0001")]
    assert "died" in str(aside[0].set_aside)
    assert store.done(stages[-1].tables[0]) == {"0000", "0002", "0003"}


def test_worker_that_dies_once_changes_nothing(tmp_path: Path, ray_driver: Driver, expected: dict[str, bytes]) -> None:
    """Guards against half a shard, or another shard, after a worker was killed in the middle."""
    store = Store(str(tmp_path / "root"))
    shards = fill_pool(store)
    list(ray_driver.run(store, [ToyFetch(die_once=tmp_path / "died"), ToyScore()], shards))
    assert (tmp_path / "died").exists()
    assert store.sweep(store.folder(ToyFetch.tables[0])) == 1
    assert bytes_of(store) == expected
    assert set_aside(store, ToyFetch()) == {}


class DiesInSetup(ToyFetch):
    """A worker that is lost while it loads its model."""

    def setup(self) -> None:
        assert self.die_once is not None
        if not self.die_once.exists():
            self.die_once.write_text("died")
            os._exit(9)


def test_worker_lost_in_setup_is_replaced(tmp_path: Path, ray_driver: Driver) -> None:
    """Guards against a spot node that goes while a model loads and takes the whole run with it."""
    store = Store(str(tmp_path / "root"))
    shards = fill_pool(store, shards=2, rows=300)
    stage = DiesInSetup(die_once=tmp_path / "died")
    assert len(list(ray_driver.run(store, [stage], shards))) == 2
    assert (tmp_path / "died").exists()


class FullDisk(ToyFetch):
    """Writes to a disk that is full."""

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_ends_the_run_and_blames_no_shard(tmp_path: Path, driver: Driver) -> None:
    """Guards against a full disk that sets a whole pool aside within seconds."""
    store = Store(str(tmp_path))
    shards = fill_pool(store, shards=2, rows=20)
    with pytest.raises((OSError, StageError), match="No space left"):
        list(driver.run(store, [FullDisk()], shards))
    assert set_aside(store, FullDisk()) == {}


class Swept(CrossStep):
    """A step whose work another run at the same root finishes and sweeps away under it."""

    name = "swept"

    def __init__(self, other_finishes: bool) -> None:
        self.other_finishes = other_finishes

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        return store.exists("finished")

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        if self.other_finishes:
            store.put_bytes("finished", b"")
        return {"bytes": len(store.get_bytes("_work/swept/by_the_other"))}


def test_step_that_another_run_finished_is_done(tmp_path: Path) -> None:
    """Guards against the slower of two runs at one root failing on files that the faster one has swept away."""
    job = Job(parse_recipe({"root": str(tmp_path), "ingest": {"sources": ["a.parquet"]}}))
    with pytest.raises(FileNotFoundError):
        job.across(Swept(other_finishes=False))
    job.across(Swept(other_finishes=True))


def test_map_gives_every_result_and_the_functions_own_error(driver: Driver) -> None:
    """Guards against lost items, and against Ray's wrapper hiding which error it was."""
    assert sorted(driver.map(_square, list(range(50)))) == [n * n for n in range(50)]
    assert list(driver.map(_square, [])) == []
    assert sorted(driver.map(partial(pow, 2), [1, 2, 3])) == [2, 4, 8]
    with pytest.raises(ZeroDivisionError):
        list(driver.map(_invert, [1, 0]))


def _square(number: int) -> int:
    return number * number


def _invert(number: int) -> float:
    return 1 / number


def test_unfinished_files_are_not_seen(tmp_path: Path) -> None:
    """Guards against a torn write that passes for a shard."""
    store = Store(str(tmp_path))
    (shard, *_) = fill_pool(store, shards=1)
    with pytest.raises(RuntimeError), store.staged(store.shard_path(SAMPLES, "9999")) as local:
        local.write_bytes(b"half")
        assert store.done(SAMPLES) == {shard.name}
        raise RuntimeError
    assert list((tmp_path / store.folder(SAMPLES)).glob(".tmp*")) == []

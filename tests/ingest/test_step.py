"""Batches, repeats, kills: what makes the pool the same whatever happens on the way."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from curate.config import IngestSettings
from curate.errors import SourceError
from curate.ingest import spill
from curate.ingest import step as step_module
from curate.ingest.step import ingest_step
from curate.metrics import progress
from curate.schema import key_of
from curate.store import Store
from tests.ingest.pool import Killed, MortalStore, ingest, rows_of, tree, write_parquet

Pair = tuple[str, str]


def _pairs(rows: int, seed: int) -> list[Pair]:
    rng = random.Random(seed)
    return [(f"http://h{rng.randrange(40)}/x", f"text {rng.randrange(6)}") for _ in range(rows)]


def _table(path: Path, pairs: Sequence[Pair]) -> Path:
    return write_parquet(path, {"url": [url for url, _ in pairs], "text": [text for _, text in pairs],
                                "place": [f"{path.stem} {row}" for row in range(len(pairs))]})  # fmt: skip


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions, runs and merges at a size that a test can have."""
    monkeypatch.setattr(step_module, "ROWS_PER_PARTITION", 100)
    monkeypatch.setattr(step_module, "MERGED_EVERY", 3)
    monkeypatch.setattr(spill, "RUN_ROWS", 64)


@pytest.mark.usefixtures("small_parts")
def test_each_pair_once_across_files_and_runs(tmp_path: Path) -> None:
    """Guards against a repeat that hides in another file, another run or another partition; the first one stays."""
    store = Store(str(tmp_path / "root"))
    files: list[Path] = []
    expected: dict[str, str] = {}
    batches = [[30, 120], [200], [1, 90, 64], [300], [50], [10], [70]]
    for number, sizes in enumerate(batches):
        for place, size in enumerate(sizes):
            pairs = _pairs(size, seed=number * 10 + place)
            files.append(_table(tmp_path / f"{number}-{place}.parquet", pairs))
            for row, (url, text) in enumerate(pairs):
                expected.setdefault(key_of(url, text), f"{number}-{place} {row}")
        samples, counts = ingest(store, files, rows_per_shard=37)
        assert counts["rows_in"] == sum(sizes)
        assert counts["rows_in"] == counts["samples"] + counts["duplicates"]
        rows = rows_of(store, samples)
        assert [(row["key"], row["place"]) for row in rows] == list(expected.items())
    assert all(shard.rows <= 37 for shard in store.shards(samples))
    assert [shard.name for shard in store.shards(samples)] == sorted(store.done(samples))
    kept = store.names(f"{store.folder(samples)}/_keys")
    assert kept == ["000005", "000006"]  # what batch 5 took in is gone


def test_running_again_changes_nothing(tmp_path: Path) -> None:
    """Guards against a second run that does anything at all."""
    store = Store(str(tmp_path / "root"))
    file = _table(tmp_path / "a.parquet", _pairs(50, 0))
    ingest(store, [file])
    before = tree(tmp_path / "root")
    assert ingest(store, [file])[1] == {}
    os.utime(file, ns=(1, 1))  # touched, not changed
    assert ingest(store, [file])[1] == {}
    assert tree(tmp_path / "root") == before


def test_sources_may_change_and_go(tmp_path: Path) -> None:
    """Guards against rows that vanish with their source, and against new content that is not noticed."""
    store = Store(str(tmp_path / "root"))
    one, two = _table(tmp_path / "a.parquet", _pairs(20, 0)), _table(tmp_path / "b.parquet", _pairs(20, 1))
    samples, _ = ingest(store, [one, two])
    before = {row["key"] for row in rows_of(store, samples)}
    _table(one, [("http://new", "row"), *_pairs(20, 0)])
    samples, counts = ingest(store, [one])
    assert (counts["rows_in"], counts["samples"], counts["sources_gone"]) == (21, 1, 1)
    assert {row["key"] for row in rows_of(store, samples)} == before | {key_of("http://new", "row")}


def test_settings_name_the_table_and_the_list_of_sources_does_not(tmp_path: Path) -> None:
    """Guards against a new crawl that starts the pool anew, and against a new `where` that mixes into the old one."""
    store = Store(str(tmp_path / "root"))
    one, two = _table(tmp_path / "a.parquet", _pairs(20, 0)), _table(tmp_path / "b.parquet", _pairs(20, 1))
    first, _ = ingest(store, [one])
    assert ingest(store, [one, two])[0].fingerprint == first.fingerprint
    assert ingest(store, [one], where="url IS NOT NULL")[0].fingerprint != first.fingerprint


def _shuffled(seed: int) -> Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]:
    def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        mixed = list(items)
        random.Random(seed).shuffle(mixed)
        return map(function, mixed)

    return run


@pytest.mark.usefixtures("small_parts")
def test_the_order_of_work_does_not_show(tmp_path: Path) -> None:
    """Guards against a pool that depends on which worker was first."""
    files = [_table(tmp_path / f"{number}.parquet", _pairs(90, number)) for number in range(5)]
    trees = []
    for seed in range(3):
        root = tmp_path / f"root{seed}"
        ingest(Store(str(root)), files, _shuffled(seed), rows_per_shard=20)
        trees.append(tree(root))
    assert trees[0] == trees[1] == trees[2]
    assert sum(name.endswith(".parquet") for name in trees[0]) > 5


@pytest.mark.usefixtures("small_parts")
def test_killed_at_every_change_at_rest(tmp_path: Path) -> None:
    """Guards against a kill after which rows are missing, doubled or in another shard."""
    files = [_table(tmp_path / f"{number}.parquet", _pairs(60, number)) for number in range(4)]
    calm = tmp_path / "calm"
    ingest(Store(str(calm)), files[:2], rows_per_shard=25)
    ingest(Store(str(calm)), files, rows_per_shard=25)
    expected = tree(calm)
    for lives in range(1000):
        root = tmp_path / f"root{lives}"
        ingest(Store(str(root)), files[:2], rows_per_shard=25)
        try:
            ingest(MortalStore(str(root), lives), files, rows_per_shard=25)
        except Killed:
            pass
        else:
            break
        ingest(Store(str(root)), files, rows_per_shard=25)
        assert tree(root) == expected, f"killed before change {lives}"
    assert lives > 15


def test_a_batch_begun_is_finished_before_newer_sources(tmp_path: Path) -> None:
    """Guards against a plan that grows while it is carried out: its shards would not be those of a calm run."""
    one, two = _table(tmp_path / "a.parquet", _pairs(30, 0)), _table(tmp_path / "b.parquet", _pairs(30, 1))
    root = tmp_path / "root"
    with pytest.raises(Killed):
        ingest(MortalStore(str(root), 4), [two])
    store = Store(str(root))
    samples, _ = ingest(store, [one, two])
    assert [[Path(source["path"]).name for source in batch["sources"]] for batch in store.batches(samples)] == [
        ["b.parquet"], ["a.parquet"],
    ]  # fmt: skip


def test_a_batch_whose_source_changed_is_planned_anew(tmp_path: Path) -> None:
    """Guards against a pool made of half an old file and half a new one, and against shards that nobody owns."""
    one = _table(tmp_path / "a.parquet", _pairs(200, 0))
    root, calm = tmp_path / "root", tmp_path / "calm"
    with pytest.raises(Killed):
        ingest(MortalStore(str(root), 8), [one], rows_per_shard=20)
    assert any(path.suffix == ".parquet" for path in root.rglob("*"))
    _table(one, _pairs(5, 3))
    ingest(Store(str(root)), [one], rows_per_shard=20)
    ingest(Store(str(calm)), [one], rows_per_shard=20)
    assert tree(root) == tree(calm)


def test_a_source_that_changes_under_the_passes_is_noticed(tmp_path: Path) -> None:
    """Guards against keys of one content beside rows of another."""
    one = _table(tmp_path / "a.parquet", _pairs(20, 0))
    store = Store(str(tmp_path / "root"))
    step = ingest_step(IngestSettings(sources=[str(one)]), store)
    calls = 0

    def meddling(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        nonlocal calls
        calls += 1
        if calls == 4:  # hash, spill, compare, write
            _table(one, _pairs(21, 0))
        return map(function, items)

    with progress("ingest", 1) as ticker, pytest.raises(SourceError, match="changed while"):
        step.run(store, [], meddling, ticker)
    assert store.shards(step.tables[0]) == []

"""Killed processes, other processes, and no process that holds everything."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curate.config import DedupSettings, ReferenceSettings
from curate.dedup.near_vectors import VectorSearch
from tests.dedup.pool import VectorPool, in_small_cells, planted

VECTORS = DedupSettings(by="embedding_toy", threshold=0.9, keep="key")
HASHES = DedupSettings(by="image_phash", radius=3, keep="key")
NEAREST = DedupSettings(by="embedding_toy", form="dinov2", neighbours=3, keep="key")


def _hashes() -> list[str]:
    """200, of which a third are one or two bits from one another."""
    draw = np.random.default_rng(1)
    values = draw.integers(0, 1 << 63, 200, dtype=np.uint64)
    values[::3] = values[0] ^ (np.uint64(1) << draw.integers(0, 63, len(values[::3])).astype(np.uint64))
    return [f"{value:016x}" for value in values]


def _pool(root: Path) -> VectorPool:
    """200 rows in four shards, with vectors and hashes of which many are near others."""
    return VectorPool(root, planted(200), 50, hashes=_hashes())


def _rules(beside: Path) -> list[DedupSettings]:
    """Rules of every search, each with a reference set that some rows reach."""
    np.save(beside / "eval.npy", planted(200)[10::40])
    (beside / "eval.txt").write_text("\n".join(_hashes()[10::40]))
    hashes = ReferenceSettings(name="val", hashes=str(beside / "eval.txt"), radius=2)
    vectors = ReferenceSettings(name="test", embeddings=str(beside / "eval.npy"), threshold=0.8)
    against = [{"against": [hashes]}, {"against": [vectors]}, {}]
    return [rule.model_copy(update=more) for rule, more in zip((HASHES, VECTORS, NEAREST), against, strict=True)]


def run_there(root: str) -> None:
    """What the killed process does."""
    _pool(Path(root)).run(*_rules(Path(root).parent))


def test_sigkill_at_any_time_leaves_the_same_groups(tmp_path: Path) -> None:
    """Guards against a file that a killed process leaves half, which a test inside one process cannot see."""
    whole, rules = _pool(tmp_path / "whole"), _rules(tmp_path)
    expected = whole.rows(whole.run(*rules)[0])
    assert {row["duplicate_kind"] for row in expected} > {"image_phash", "embedding_toy", "reference:val"}
    root = tmp_path / "killed"
    command = [sys.executable, "-c", f"from tests.dedup.test_processes import run_there; run_there({str(root)!r})"]
    kills = 0
    for files in (2, 40):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
        while process.poll() is None and sum(1 for _ in root.glob("_work/**/*.*")) < files:
            time.sleep(0.001)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills == 2
    again = _pool(root)
    step, _ = again.run(*rules)
    assert again.rows(step) == expected
    assert not again.store.names("_work/duplicates")


def test_ray_gives_the_same_table(tmp_path: Path, ray_driver: Any) -> None:
    """Guards against near copies that fall on different workers and are missed."""
    here, there = _pool(tmp_path / "here"), _pool(tmp_path / "there")
    expected = here.rows(here.run(HASHES, VECTORS)[0])
    assert there.rows(there.run(HASHES, VECTORS, map_items=ray_driver.map)[0]) == expected
    assert sum(row["is_duplicate"] for row in expected) > 60


def test_no_task_holds_all_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a step that reads the pool into one process: each sees a chunk, a partition, or a shard."""
    in_small_cells(monkeypatch)
    pool = VectorPool(tmp_path, planted(1_500), 50)
    held: list[int] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def work(self: VectorSearch, *args: Any) -> Any:
            result = function(self, *args)
            held.append(len(result[0]) if function.__name__ == "_load" else len(args[0]))
            return result

        return work

    monkeypatch.setattr(VectorSearch, "deal", counted(VectorSearch.deal))
    monkeypatch.setattr(VectorSearch, "_load", counted(VectorSearch._load))
    pool.run(VECTORS)
    assert len(held) > 8 and sum(held) > 1_500 and max(held) < 1_000

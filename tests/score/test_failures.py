"""What a scorer cannot score, for each kind of scorer: null with a counted reason, never NaN, never another row's."""

import hashlib
import multiprocessing
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curate.schema import Shard, TableSpec
from curate.score import registry
from curate.score.scorer import FeatureScorer, Float32, ScorerSettings, TextScorer, Values
from curate.score.stage import score_stages
from curate.stage import Stage, run_shard
from curate.store import Store
from tests.score.tiny import IMAGES, SAMPLES, encoded, filled, picture, tiny_clip

KILLS = 4


class HeadSettings(ScorerSettings):
    features: str
    limits: tuple[float, float, float]


class FussyHead(FeatureScorer):
    """By the first feature: raises below one limit, gives NaN below the next, infinity below the third."""

    settings_type = HeadSettings

    def __init__(self, name: str, settings: HeadSettings) -> None:
        super().__init__(name, settings)
        self.source, self.limits = settings.features, settings.limits

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        return (pa.field("fussy_head", pa.float32()),)

    def score(self, features: Float32) -> Mapping[str, Values]:
        raises, odd, infinite = (features[:, 0] < limit for limit in self.limits)
        if raises.any():
            raise ValueError("not this one")
        return {"fussy_head": np.where(odd, np.nan, np.where(infinite, np.inf, features[:, 0]))}


class FussyText(TextScorer):
    """Raises on `bad`, gives NaN for `nothing`."""

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        return (pa.field("fussy_text", pa.float32()), pa.field("fussy_word", pa.string()))

    def score(self, texts: Sequence[str]) -> Mapping[str, Values]:
        if "bad" in texts:
            raise KeyError("bad")
        numbers = [float("nan") if text == "nothing" else float(len(text)) for text in texts]
        return {"fussy_text": numbers, "fussy_word": [text.upper() for text in texts]}


@pytest.fixture
def fussy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.SCORERS, "fussy_head", FussyHead)
    monkeypatch.setitem(registry.SCORERS, "fussy_text", FussyText)


def run(store: Store, shard: Shard, section: Mapping[str, Mapping[str, object]]) -> tuple[list[Stage], dict[str, int]]:
    """Every stage of the section on the shard, and what they counted."""
    stages, counts = score_stages(section, SAMPLES, IMAGES), {}
    for stage in stages:
        stage.setup()
        counts |= run_shard(store, stage, shard).counts
    return stages, counts


def table(store: Store, shard: Shard, stages: Sequence[Stage], name: str) -> pa.Table:
    spec: TableSpec = next(spec for stage in stages for spec in stage.tables if spec.name == name)
    return store.read(spec, shard.name)


def test_a_head_that_raises_or_is_not_finite(tmp_path: Path, fussy: None) -> None:
    """Guards against one picture's features taking down a shard, and against infinity in a table."""
    data = [encoded(picture(row), "PNG") for row in range(60)]
    store, shard = filled(tmp_path / "root", [*data, b"broken"], ["a"] * 61)
    clip = {"scorer": "clip", "model": f"local-dir:{tiny_clip(tmp_path / 'clip')}"}
    before, _ = run(store, shard, {"clip_tiny": clip})
    vectors = table(store, shard, before, "embeddings_clip_tiny").column("clip_tiny_image").to_pylist()[:60]
    first = [float(vector[0]) for vector in vectors]
    limits = [float(np.quantile(first, share)) for share in (0.1, 0.3, 0.5)]
    head = {"scorer": "fussy_head", "features": "clip_tiny", "limits": limits}
    stages, counts = run(store, shard, {"clip_tiny": clip, "head": head})
    values = table(store, shard, stages, "scores_head").column("fussy_head").to_pylist()
    assert values == [None if number < limits[2] else number for number in first] + [None]
    raised = sum(number < limits[0] for number in first)
    assert counts == {
        "scores_head: raised_ValueError": raised, "scores_head: no_features": 1,
        "scores_head.fussy_head: not_finite": sum(number < limits[2] for number in first) - raised,
    }  # fmt: skip


def test_a_text_scorer_that_raises_or_is_not_finite(tmp_path: Path, fussy: None) -> None:
    """Guards against one caption taking down a shard, and against reasons counted once for a text of many rows."""
    texts = ["good", "bad", None, "nothing", "bad", "good", "nothing"]
    store, shard = filled(tmp_path, [None] * len(texts), texts)
    stages, counts = run(store, shard, {"x": {"scorer": "fussy_text"}})
    found = table(store, shard, stages, "scores_x")
    assert found.column("fussy_text").to_pylist() == [4.0, None, None, None, None, 4.0, None]
    assert found.column("fussy_word").to_pylist() == ["GOOD", None, None, "NOTHING", None, "GOOD", "NOTHING"]
    assert counts == {"scores_x: raised_KeyError": 2, "scores_x.fussy_text: not_finite": 2}


def score_all(root: str, shards: Sequence[Shard], section: Mapping[str, Mapping[str, object]]) -> None:
    """What a worker does; in a process of its own."""
    for shard in shards:
        run(Store(root), shard, section)


def hashes(root: Path) -> dict[str, str]:
    files = sorted(file for file in root.rglob("*.parquet") if not file.name.startswith("."))
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_killed_scoring_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Guards against half-written tables being read, and against batches that depend on where a kill came."""
    clip = {"scorer": "clip", "model": f"local-dir:{tiny_clip(tmp_path / 'clip')}", "batch_size": 8}
    section = {"clip_tiny": clip, "phash": {"scorer": "phash"}, "facts": {"scorer": "image_facts"}}
    roots = {name: tmp_path / name for name in ("whole", "killed")}
    for root in roots.values():
        shards = [
            filled(root, [encoded(picture(50 * number + row, (300, 200))) for row in range(50)], ["a", "b"] * 25, name)[
                1
            ]
            for number, name in enumerate(("s-0", "s-1", "s-2", "s-3"))
        ]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.score.test_failures", "curate.score.clip_model"])

    def worker(root: Path) -> float:
        start = time.monotonic()
        process = context.Process(target=score_all, args=(str(root), shards, section))
        process.start()
        if root == roots["killed"] and killed < KILLS:
            process.join(draw.uniform(0.1, 0.9) * span)
            process.kill()
        process.join()
        done.append(process.exitcode)
        return time.monotonic() - start

    draw, killed, span, done = random.Random(0), 0, 0.0, []
    worker(roots["whole"])  # starts the server that the others fork from
    span = worker(roots["whole"]) + 0.3
    while not done or done[-1] != 0 or killed == 0:
        worker(roots["killed"])
        killed += 1
    assert -9 in done
    assert hashes(roots["killed"]) == hashes(roots["whole"])

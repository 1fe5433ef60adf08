"""The score stages on a real store, with a tiny open_clip model."""

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import imagehash
import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from PIL import Image

from curate.errors import ConfigError, PlanError, StageError, WeightsError
from curate.schema import Shard, TableSpec
from curate.score import registry
from curate.score import stage as stage_module
from curate.score.chunk import Chunk
from curate.score.decode import Picture, Unscorable
from curate.score.registry import build
from curate.score.run import Runner, prepare
from curate.score.scorer import Device, FeatureScorer, Float32, ImageScorer, ScorerSettings, Values
from curate.score.stage import score_stages
from curate.stage import Stage, run_shard
from curate.store import Store
from tests.score.tiny import IMAGES, SAMPLES, WIDTH, encoded, filled, picture, tiny_clip


class HeadSettings(ScorerSettings):
    features: str


class SumHead(FeatureScorer):
    """Sum of squares of the features: 1 up to float16, and a fingerprint of their bits."""

    settings_type = HeadSettings

    def __init__(self, name: str, settings: HeadSettings) -> None:
        super().__init__(name, settings)
        self.source = settings.features

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        return (pa.field(f"{self.name}_sum", pa.float32()),)

    def score(self, features: Float32) -> Mapping[str, Values]:
        return {f"{self.name}_sum": (features * np.arange(features.shape[1])).sum(axis=1)}


class Fussy(ImageScorer[int]):
    """Raises on odd widths, gives NaN for width 42, and runs out of memory above two rows."""

    calls: ClassVar[list[int]] = []

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        return (pa.field("fussy", pa.float32()),)

    def prepare(self, picture: Picture, text: str | None) -> int | Unscorable:
        return picture.image.width

    def score(self, prepared: Sequence[int]) -> Mapping[str, Values]:
        self.calls.append(len(prepared))
        if len(prepared) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if any(width % 2 for width in prepared):
            raise ValueError("odd")
        return {"fussy": np.array([np.nan if width == 42 else width for width in prepared])}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.SCORERS, "sum", SumHead)
    monkeypatch.setitem(registry.SCORERS, "fussy", Fussy)


def images(count: int) -> list[bytes | None]:
    """JPEGs, every seventh a failed download, the fifth cut short."""
    found: list[bytes | None] = [None if row % 7 == 6 else encoded(picture(row)) for row in range(count)]
    found[5] = found[5][:200] if found[5] else None
    return found


def texts(count: int) -> list[str | None]:
    return [None if row % 5 == 4 else f"a picture of thing {row % 11}" for row in range(count)]


def score(store: Store, shard: Shard, section: Mapping[str, Mapping[str, object]]) -> list[Stage]:
    """Run what is missing, as the inline driver would; returns the stages."""
    stages = score_stages(section, SAMPLES, IMAGES)
    for stage in stages:
        stage.check(store)
        stage.setup()
        run_shard(store, stage, shard)
        stage.teardown()
    return stages


def spec(stages: Sequence[Stage], name: str) -> TableSpec:
    return next(table for stage in stages for table in stage.tables if table.name == name)


def shas(store: Store, stages: Sequence[Stage], shard: Shard) -> dict[str, str]:
    tables = [table for stage in stages for table in stage.tables]
    paths = {table.name: Path(store.full(store.shard_path(table, shard.name))) for table in tables}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


def test_values_are_those_of_open_clip_and_imagehash(tmp_path: Path, clip: Path) -> None:
    """Guards against wrong preprocessing, misplaced rows, and NaN where there is no value."""
    data, captions = images(150), texts(150)
    store, shard = filled(tmp_path, data, captions)
    section = {
        "clip_tiny": {"scorer": "clip", "model": f"local-dir:{clip}", "batch_size": 16},
        "phash": {"scorer": "phash"},
        "text": {"scorer": "text_stats"},
    }
    stages = score(store, shard, section)
    similarity = store.read(spec(stages, "scores_clip_tiny"), shard.name).column("clip_similarity_tiny").to_pylist()
    vectors = store.read(spec(stages, "embeddings_clip_tiny"), shard.name)
    hashes = store.read(spec(stages, "scores_phash"), shard.name).column("image_phash").to_pylist()
    counts = store.read(spec(stages, "scores_text"), shard.name)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    assert vectors.schema.field("clip_tiny_image").type == pa.list_(pa.float16(), WIDTH)
    for row, (item, text) in enumerate(zip(data, captions, strict=True)):
        if item is None or row == 5:
            assert similarity[row] is hashes[row] is vectors["clip_tiny_image"][row].as_py() is None
            continue
        path = tmp_path / "one.jpg"
        path.write_bytes(item)
        image = Image.open(path)
        with torch.inference_mode():
            seen = model.encode_image(preprocess(image)[None], normalize=True)[0]
        assert np.allclose(vectors["clip_tiny_image"][row].as_py(), seen.numpy(), atol=1e-3)
        assert hashes[row] == str(imagehash.phash(image))
        if text is None:
            assert similarity[row] is None and vectors["clip_tiny_text"][row].as_py() is None
        else:
            with torch.inference_mode():
                said = model.encode_text(tokenizer([text]), normalize=True)[0]
            assert similarity[row] == pytest.approx(float(seen @ said), abs=2e-6)
    assert counts["word_count"].to_pylist() == [None if text is None else 5 for text in captions]


def test_adding_a_scorer_computes_only_that(tmp_path: Path, clip: Path, scorers: None) -> None:
    """Guards against a scored pool being scored again, and against other bits from committed features."""
    store, shard = filled(tmp_path, images(100), texts(100))
    section: dict[str, dict[str, object]] = {"clip_tiny": {"scorer": "clip", "model": f"local-dir:{clip}"}}
    before = shas(store, score(store, shard, section), shard)
    later = section | {"head": {"scorer": "sum", "features": "clip_tiny"}}
    (stage,) = score_stages(later, SAMPLES, IMAGES)
    assert [read.columns for read in stage.reads(frozenset({"scores_head"}))] == [
        ("status", "width", "height"),
        ("clip_tiny_image",),
    ]
    stage.setup()
    assert run_shard(store, stage, shard).computed == ("scores_head",)
    assert run_shard(store, stage, shard).computed == ()
    after = shas(store, [stage], shard)
    assert before.items() <= after.items()
    other, same = filled(tmp_path / "at-once", images(100), texts(100))
    at_once = shas(other, score(other, same, later), same)
    assert at_once == after


def test_resume_and_partial_tables_give_the_same_bits(tmp_path: Path, clip: Path) -> None:
    """Guards against batches that depend on where an earlier run stopped."""
    store, shard = filled(tmp_path, images(150), texts(150))
    section = {"clip_tiny": {"scorer": "clip", "model": f"local-dir:{clip}"}, "phash": {"scorer": "phash"}}
    stages = score(store, shard, section)
    whole = shas(store, stages, shard)
    for lost in ("scores_clip_tiny", "embeddings_clip_tiny"):
        Path(store.full(store.shard_path(spec(stages, lost), shard.name))).unlink()
        assert shas(store, score(store, shard, section), shard) == whole


def test_bad_samples_memory_and_nan_are_nulls_with_reasons(tmp_path: Path, scorers: None) -> None:
    """Guards against a bad sample failing a shard, NaN in a table, and an out-of-memory error ending a run."""
    sizes = [(40, 40), (41, 40), (42, 40), (44, 40), (46, 40)]
    data = [encoded(picture(row, size)) for row, size in enumerate(sizes)]
    store, shard = filled(tmp_path, [*data, b"no image", None], ["a"] * 7)
    (stage,) = score_stages({"fussy": {"scorer": "fussy"}}, SAMPLES, IMAGES)
    Fussy.calls.clear()
    stage.setup()
    report = run_shard(store, stage, shard)
    values = store.read(stage.tables[0], shard.name).column("fussy")
    assert values.to_pylist() == [40.0, None, None, 44.0, 46.0, None, None]
    assert report.counts == {
        "scores_fussy: raised_ValueError": 1, "scores_fussy.fussy: not_finite": 1, "scores_fussy: not_image": 1,
    }  # fmt: skip
    assert max(Fussy.calls) == 5 and Fussy.calls.count(5) == 1


def test_scorers_side_by_side_give_the_same(tmp_path: Path, clip: Path, scorers: None) -> None:
    """Guards against columns or counts that are mixed up or lost where scorers run in threads, as they do on a GPU."""
    section = {"clip_tiny": {"scorer": "clip", "model": f"local-dir:{clip}"}, "phash": {"scorer": "phash"},
               "facts": {"scorer": "image_facts"}, "fussy": {"scorer": "fussy"},
               "head": {"scorer": "sum", "features": "clip_tiny"}}  # fmt: skip
    built = build(section)
    pixels = [scorer for scorer in built if isinstance(scorer, ImageScorer)]
    for scorer in pixels:
        scorer.load(Device())
    data, captions = images(40), texts(40)
    prepared = [prepare(pixels, item, text) for item, text in zip(data, captions, strict=True)]
    found = []
    for abreast in (False, True):
        counts: Counter[str] = Counter()
        runner = Runner(pixels, [one for one in built if isinstance(one, FeatureScorer)], counts, abreast=abreast)
        found.append((runner.run(Chunk(40, list(range(40)), texts=captions), prepared), counts))
    assert found[0] == found[1] and found[0][1]["scores_phash: no_image"] == 5


def test_a_shard_without_images_is_all_null(tmp_path: Path, clip: Path, scorers: None) -> None:
    """Guards against a shard whose every download failed ending a run."""
    store, shard = filled(tmp_path, [None] * 3, ["a", None, "b"])
    section = {
        "clip_tiny": {"scorer": "clip", "model": f"local-dir:{clip}"},
        "head": {"scorer": "sum", "features": "clip_tiny"},
        "phash": {"scorer": "phash"},
    }
    stages = score(store, shard, section)
    for table in stages[0].tables:
        assert all(column.null_count == 3 for column in store.read(table, shard.name).columns[1:])
    Path(store.full(store.shard_path(spec(stages, "scores_head"), shard.name))).unlink()
    score(store, shard, section)
    assert store.read(spec(stages, "scores_head"), shard.name).column("head_sum").null_count == 3


def test_a_broken_scorer_raises(tmp_path: Path, scorers: None) -> None:
    """Guards against a scorer that always fails turning a whole pool into nulls."""
    store, shard = filled(tmp_path, [encoded(picture(row, (41, 40))) for row in range(4)], ["a"] * 4)
    (stage,) = score_stages({"fussy": {"scorer": "fussy"}}, SAMPLES, IMAGES)
    stage.setup()
    with pytest.raises(ValueError, match="odd"):
        run_shard(store, stage, shard)


def test_identity_is_content_not_place(tmp_path: Path, clip: Path) -> None:
    """Guards against a moved model folder scoring everything again, and a replaced one scoring nothing."""

    def fingerprints(folder: Path, **extra: object) -> list[str]:
        section = {"clip_tiny": {"scorer": "clip", "model": f"local-dir:{folder}", **extra}}
        return [table.fingerprint for table in score_stages(section, SAMPLES, IMAGES)[0].tables]

    moved = tiny_clip(tmp_path / "moved")
    other = tiny_clip(tmp_path / "other", seed=1)
    assert fingerprints(clip) == fingerprints(moved) == fingerprints(clip, batch_size=7)
    assert not set(fingerprints(clip)) & set(fingerprints(other))
    assert not set(fingerprints(clip)) & set(fingerprints(clip, preprocess="fast"))


@pytest.mark.parametrize(
    ("section", "error", "words"),
    [
        ({"a": {"model": "x"}}, ConfigError, "score.a.scorer: required"),
        ({"a": {"scorer": "clop"}}, ConfigError, "near: clip"),
        ({"a": {"scorer": "clip"}}, ConfigError, "score.a.model: required"),
        ({"a": {"scorer": "phash", "colum": "x"}}, ConfigError, "score.a.colum: unknown key; it takes column"),
        ({"a": {"scorer": "phash"}, "b": {"scorer": "phash"}}, ConfigError, "column image_phash is written by score.a"),
        ({"h": {"scorer": "sum", "features": "clap"}}, ConfigError, "score.h.features: 'clap' is no entry"),
        ({"a": {"scorer": "clip", "model": "ViT-L-15", "pretrained": "openai"}}, ConfigError, "near: ViT-L-1"),
        ({"a": {"scorer": "clip", "model": "ViT-L-14"}}, ConfigError, "score.a.pretrained: required"),
        ({"a": {"scorer": "clip", "model": "local-dir:/none"}}, WeightsError, "no /none/open_clip_config.json"),
        (
            {"a": {"scorer": "clip", "model": "ViT-L-14-quickgelu", "pretrained": "openai"}},
            WeightsError, "curate weights pull clip-vit-l14-openai",
        ),
        (
            {"a": {"scorer": "clip", "model": "ViT-L-14", "pretrained": "openai"}},
            ConfigError, "write model: ViT-L-14-quickgelu",
        ),
        (
            {"a": {"scorer": "clip", "model": "ViT-L-14", "pretrained": "openaii"}},
            ConfigError, "'openaii' is no tag of ViT-L-14",
        ),
        (
            {"a": {"scorer": "clip", "model": "hf-hub:nobody/nothing"}},
            WeightsError, "hf download nobody/nothing",
        ),
    ],
)  # fmt: skip
def test_the_plan_says_what_is_wrong(
    tmp_path: Path, section: Mapping[str, Mapping[str, object]], error: type[Exception], words: str, scorers: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Guards against a mistake that shows only on a worker."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("CURATE_WEIGHTS", "")
    with pytest.raises(error, match=words.replace("(", r"\(")):
        for stage in score_stages(section, SAMPLES, IMAGES):
            stage.check(Store(str(tmp_path)))


def test_text_scores_need_no_images(tmp_path: Path) -> None:
    """Guards against a text-only pipeline asking for a fetch, and an image scorer without images being let through."""
    (stage,) = score_stages({"text": {"scorer": "text_stats"}}, SAMPLES, None)
    assert stage.name == "score_text"
    with pytest.raises(PlanError, match=r"score\.phash: scores images"):
        score_stages({"phash": {"scorer": "phash"}}, SAMPLES, None)


def test_cuda_that_is_not_there(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a GPU run that silently goes on on the CPU."""
    monkeypatch.setattr(stage_module, "gpu_present", lambda: False)
    section = {"clip_tiny": {"scorer": "clip", "model": f"local-dir:{clip}", "device": "cuda"}}
    (stage,) = score_stages(section, SAMPLES, IMAGES)
    assert stage.resources.gpus == 1
    with pytest.raises(StageError, match=r"score.clip_tiny.device: cuda"):
        stage.setup()


def test_a_plan_loads_no_torch(clip: Path) -> None:
    """Guards against seconds of imports before `curate plan` says anything."""
    code = (
        "import sys; from curate.score.stage import score_stages; from curate.schema import *; import pyarrow as pa;"
        "samples = TableSpec('samples', 1, pa.schema(SAMPLE_FIELDS)); images = TableSpec('images', 1, IMAGES_SCHEMA);"
        f"section = {{'c': {{'scorer': 'clip', 'model': 'local-dir:{clip}'}}}};"
        "[stage.check(None) for stage in score_stages(section, samples, images)];"
        "print([m for m in ('torch', 'ray', 'open_clip') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

"""Every scorer of the registry through the stage, against the plain callable or library it wraps."""

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageFont

from curate.errors import ConfigError
from curate.score.aesthetic import AestheticHead
from curate.score.decode import Picture, decode
from curate.score.faces import YuNetFaces
from curate.score.image_facts import image_facts
from curate.score.nsfw import LaionNsfwHead
from curate.score.registry import build
from curate.score.scorer import Device, ImageScorer
from curate.score.stage import score_stages
from curate.score.text_density import TextDetector
from curate.score.text_mask import painted_over
from curate.score.text_recognition import TextReader
from curate.stage import run_shard
from tests.score.tiny import IMAGES, SAMPLES, encoded, filled, picture, tiny_clip

SHARED = os.environ.get("CURATE_SHARED")
needs_shared = pytest.mark.skipif(SHARED is None, reason="CURATE_SHARED is not set: no real weights and images here")
CLIP_L14 = {"scorer": "clip", "model": "ViT-L-14-quickgelu", "pretrained": "openai"}


def real_images(pattern: str, step: int) -> list[bytes]:
    files = sorted(path for path in Path(str(SHARED), "realdata", "images").rglob(pattern) if path.is_file())
    return [file.read_bytes() for file in files[::step]]


@needs_shared
@pytest.mark.parametrize("kind", ["faces", "text_density"])
def test_detectors_are_their_plain_callables(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against pictures that reach a detector shrunk, padded or ordered in another way than alone."""
    monkeypatch.setenv("CURATE_WEIGHTS", str(Path(str(SHARED), "reference")))
    data = [item for item in real_images("*.jpg", 25) if len(item) < 300_000][:6]
    store, shard = filled(tmp_path, [*data, b"broken"], ["a"] * (len(data) + 1))
    (stage,) = score_stages({"found": {"scorer": kind}}, SAMPLES, IMAGES)
    stage.check(store)
    stage.setup()
    run_shard(store, stage, shard)
    table = store.read(stage.tables[0], shard.name)
    yunet = Path(str(SHARED), "reference", "yunet", "onnx__yunet_n_dynamic.onnx")
    plain = YuNetFaces.from_file(yunet) if kind == "faces" else TextDetector.from_file()
    pixels = [found.pixels for found in map(decode, data) if isinstance(found, Picture)]
    for name, values in plain(pixels).items():
        expected = values.tolist() if isinstance(values, np.ndarray) else values
        assert table.column(name).to_pylist()[:-1] == expected
        assert table.column(name)[len(data)].as_py() is None


@needs_shared
def test_heads_read_rounded_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a head of the wrong file: each must give what its plain callable gives."""
    folder = Path(str(SHARED), "reference")
    monkeypatch.setenv("CURATE_WEIGHTS", str(folder))
    heads = {"v2": "laion_aesthetic_v2", "v1": "laion_aesthetic_v1", "unsafe": "laion_nsfw"}
    section = {"clip_vitl14": CLIP_L14} | {
        name: {"scorer": kind, "features": "clip_vitl14"} for name, kind in heads.items()
    }
    _, *scorers = build(section)
    features = np.load(folder / "clip_autokeras_binary_nsfw_x.npy").astype(np.float32)
    plain = {
        "aesthetic_score_laion_v2": AestheticHead.from_file(folder / "sac+logos+ava1-l14-linearMSE.pth"),
        "aesthetic_score_laion_v1": AestheticHead.from_file(folder / "sa_0_4_vit_l_14_linear.pth"),
        "punsafe": LaionNsfwHead.from_zip(folder / "clip_autokeras_binary_nsfw.zip"),
    }
    for scorer in scorers:
        scorer.check()
        scorer.load(None)  # type: ignore[arg-type]
        ((column, values),) = scorer.score(features).items()  # type: ignore[attr-defined]
        assert np.array_equal(values, plain[column](features))


@pytest.mark.parametrize(
    ("clip", "head", "words"),
    [
        ({"pretrained": "laion2b_s32b_b82k", "model": "ViT-L-14"}, {}, "trained on OpenAI's features"),
        ({"pretrained": "openai", "model": "ViT-B-32-quickgelu"}, {}, "published for ViT-L-14"),
    ],
)
def test_a_head_on_foreign_features_is_refused(clip: dict[str, str], head: dict[str, str], words: str) -> None:
    """Guards against numbers without meaning: a head applied to another model's features."""
    section = {"c": {"scorer": "clip", **clip}, "a": {"scorer": "laion_aesthetic_v2", "features": "c", **head}}
    with pytest.raises(ConfigError, match=words):
        build(section)


def table_of(tmp_path: Path, data: list[bytes], entry: dict[str, object], texts: list[str | None]) -> pa.Table:
    """One entry through its stage."""
    store, shard = filled(tmp_path, data, texts)
    (stage,) = score_stages({"x": entry}, SAMPLES, IMAGES)
    stage.check(store)
    stage = pickle.loads(pickle.dumps(stage))  # as an engine sends it, after the plan's checks
    stage.setup()
    run_shard(store, stage, shard)
    return store.read(stage.tables[0], shard.name)


def test_facts_of_images_and_texts(tmp_path: Path) -> None:
    """Guards against facts of other rows, and against a null text that gets a language."""
    data = [encoded(picture(seed, (100 + seed, 80)), "PNG") for seed in range(9)]
    texts: list[str | None] = ["Ein Haus am See in den Bergen", None, *["a photograph of an old house"] * 7]
    table = table_of(tmp_path / "images", data, {"scorer": "image_facts"}, texts)
    expected = image_facts([np.asarray(picture(seed, (100 + seed, 80))) for seed in range(9)])
    for name, values in expected.items():
        assert table.column(name).to_pylist() == values.tolist()
    table = table_of(tmp_path / "texts", data, {"scorer": "text_facts"}, texts)
    assert table.column("language").to_pylist() == ["de", None, *["en"] * 7]
    assert table.column("has_content_word").to_pylist() == [True, None, *[True] * 7]


def test_masked_text_changes_only_text(tmp_path: Path) -> None:
    """Guards against T-MARS painting over the picture: unmasked pictures keep their score, printed ones change."""
    font = ImageFont.load_default(40)
    printed = Image.new("RGB", (500, 300), (200, 220, 240))
    ImageDraw.Draw(printed).text((60, 120), "GRAND HOTEL", fill=(10, 10, 10), font=font)
    data = [encoded(printed, "PNG"), encoded(picture(3, (300, 300)), "PNG")]
    model = f"local-dir:{tiny_clip(tmp_path / 'clip')}"
    masked = table_of(tmp_path / "a", data, {"scorer": "clip_text_masked", "model": model}, ["a hotel"] * 2)
    plain = table_of(tmp_path / "b", data, {"scorer": "clip", "model": model, "embeddings": False}, ["a hotel"] * 2)
    scores = masked.column("clip_similarity_text_masked").to_pylist()
    whole = plain.column("clip_similarity_x").to_pylist()
    assert scores[1] == whole[1] and scores[0] != whole[0]
    pixels = np.asarray(printed)
    (regions,) = TextDetector.from_file().detect([pixels])
    covered = painted_over(pixels, regions)
    assert (pixels.min(axis=2) < 100).sum() > 1000
    assert (covered.min(axis=2) < 100).sum() < 20 and np.array_equal(covered[:60], pixels[:60])


def test_text_is_detected_once_for_density_and_masking(tmp_path: Path) -> None:
    """Guards against a second detection where both scorers are asked for, and against one that finds other regions."""
    printed = Image.new("RGB", (700, 300), (200, 220, 240))
    ImageDraw.Draw(printed).text((60, 120), "GRAND HOTEL", fill=(10, 10, 10), font=ImageFont.load_default(40))
    model = f"local-dir:{tiny_clip(tmp_path / 'clip')}"
    density, masked = build({"t": {"scorer": "text_density"}, "m": {"scorer": "clip_text_masked", "model": model}})
    assert isinstance(density, ImageScorer) and isinstance(masked, ImageScorer)
    for scorer in (density, masked):
        scorer.load(Device())
    once, again = Picture(printed, 0), Picture(printed, 0)
    view, sample = density.prepare(once, "a hotel"), masked.prepare(once, "a hotel")
    columns = density.score([view])
    assert sample.view is view and view.regions is not None and columns["text_boxes"] == [len(view.regions.quads)]
    assert masked.score([sample]) == masked.score([masked.prepare(again, "a hotel")])


@needs_shared
def test_reading_text_is_its_plain_callable(tmp_path: Path) -> None:
    """Guards against lines that are read from a shrunk picture."""
    data = [item for item in real_images("text_light/*.jpg", 25) if len(item) < 200_000][:4]
    table = table_of(tmp_path, data, {"scorer": "text_density", "recognize": True}, [None] * len(data))
    pixels = [found.pixels for found in map(decode, data) if isinstance(found, Picture)]
    for name, values in TextReader.from_file()(pixels).items():
        assert table.column(name).to_pylist() == list(values)

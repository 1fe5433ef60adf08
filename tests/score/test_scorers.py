"""Every scorer of the registry through the stage, against the plain callable or library it wraps."""

import os
from pathlib import Path

import numpy as np
import pytest

from curate.errors import ConfigError
from curate.score.aesthetic import AestheticHead
from curate.score.decode import Picture, decode
from curate.score.faces import YuNetFaces
from curate.score.nsfw import LaionNsfwHead
from curate.score.registry import build
from curate.score.stage import score_stages
from curate.score.text_density import TextDetector
from curate.stage import run_shard
from tests.score.tiny import IMAGES, SAMPLES, filled

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
    data = [item for item in real_images("*.jpg", 25) if len(item) < 300_000]
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

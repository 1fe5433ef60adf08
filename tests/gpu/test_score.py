"""Scorers on a CUDA device against themselves on the CPU; `pytest -m gpu tests/gpu` on a machine that has one."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from curate.score.chunk import Chunk
from curate.score.clip import ClipScorer, ClipSettings
from curate.score.decode import Picture, decode
from curate.score.registry import build
from curate.score.run import Runner
from curate.score.scorer import Device, ImageScorer, TextScorer
from curate.score.watermark import build_net
from tests.score.test_opennsfw2 import draw_weights, write_h5
from tests.score.test_text import TEXTS, tiny_bert
from tests.score.test_vlm import tiny_vlm
from tests.score.tiny import encoded, picture, tiny_clip

SHARED = os.environ.get("CURATE_SHARED")
CUDA = os.environ.get("CURATE_TEST_DEVICE", "cuda")  # cpu: the tests themselves can be tried without a device
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_onnx = pytest.mark.skipif(
    CUDA == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers(), reason="no onnxruntime-gpu"
)


def pictures(count: int = 20) -> list[Picture]:
    found = [decode(encoded(picture(seed, (50 + 9 * seed, 80)), "PNG")) for seed in range(count)]
    return [item for item in found if isinstance(item, Picture)]


def both(entry: Mapping[str, object], items: list[Picture]) -> list[dict[str, np.ndarray]]:
    """The entry's columns on the CPU and on the device."""
    found = []
    for device in ("cpu", CUDA):
        (scorer,) = build({"x": entry})
        assert isinstance(scorer, ImageScorer)
        scorer.load(Device(device))
        values = scorer.score([scorer.prepare(item, f"thing {row % 3}") for row, item in enumerate(items)])
        found.append({name: np.asarray(column) for name, column in values.items() if name != "face_boxes"})
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 5e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize("preprocess", ["exact", "fast"])
def test_clip(tmp_path: Path, precision: str, tolerance: float, preprocess: str) -> None:
    """Guards against channels-last, mixed precision or the resize on the device changing more than rounding does."""
    folder = f"local-dir:{tiny_clip(tmp_path)}"
    columns = []
    for device in ("cpu", CUDA):
        scorer = ClipScorer(
            "clip_tiny", ClipSettings(model=folder, precision=precision, preprocess=preprocess, batch_size=6)
        )
        scorer.load(Device(device))
        prepared = [scorer.prepare(item, f"thing {row % 3}") for row, item in enumerate(pictures())]
        columns.append(scorer.score(prepared))
    for name in columns[0]:
        assert np.abs(np.asarray(columns[0][name]) - np.asarray(columns[1][name])).max() < tolerance


@pytest.mark.parametrize("preprocess", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["dinov2", "timm", "torchscript"])
def test_embedders(tmp_path: Path, kind: str, preprocess: str) -> None:
    """Guards against a normalisation on the device that differs from the processor's on the host."""
    torch.manual_seed(0)
    if kind == "dinov2":
        config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
        Dinov2Model(config).save_pretrained(tmp_path)
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
        BitImageProcessor(**sizes, resample=3).save_pretrained(tmp_path)
        entry: dict[str, object] = {"scorer": "hf_embed", "model": str(tmp_path)}
    elif kind == "timm":
        save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "w.safetensors")
        entry = {"scorer": "timm_embed", "model": "resnet10t", "weights": str(tmp_path / "w.safetensors"), "width": 512}
    else:
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 32, 32), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        torch.jit.script(net.eval()).save(str(tmp_path / "net.pt"))
        entry = {"scorer": "torchscript_embed", "weights": str(tmp_path / "net.pt"), "width": 6}
    cpu, there = both(entry | {"preprocess": preprocess, "batch_size": 6}, pictures())
    assert (cpu["x_image"] * there["x_image"]).sum(axis=1).min() > 0.999


@pytest.mark.parametrize("kind", ["watermark", "opennsfw2", "vlm_yes_no"])
def test_probabilities(tmp_path: Path, kind: str) -> None:
    """Guards against half precision that overflows in a network whose inputs are pixels of 255, and padding."""
    entry: dict[str, object] = {"scorer": kind}
    if kind == "watermark":
        torch.manual_seed(0)
        torch.save(build_net().state_dict(), tmp_path / "w.pt")
        entry |= {"weights": str(tmp_path / "w.pt")}
    elif kind == "opennsfw2":
        entry |= {"weights": str(write_h5(tmp_path / "w.h5", draw_weights()))}
    else:
        entry |= {"model": str(tiny_vlm(tmp_path)), "prompt": "webssl_light"}
    cpu, there = both(entry, pictures(6))
    for name, values in cpu.items():
        assert np.isfinite(there[name]).all() and np.abs(values - there[name]).max() < 0.02


@needs_onnx
@pytest.mark.skipif(SHARED is None, reason="CURATE_SHARED is not set: no YuNet and no real images here")
@pytest.mark.parametrize("entry", [{"scorer": "faces"}, {"scorer": "text_density", "recognize": True}])
def test_detectors(entry: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against another count of faces or regions through CUDA's convolutions."""
    monkeypatch.setenv("CURATE_WEIGHTS", str(Path(str(SHARED), "reference")))
    files = sorted(Path(str(SHARED), "realdata", "images", "text_light").glob("*.jpg"))[:12]
    items = [item for item in (decode(file.read_bytes()) for file in files) if isinstance(item, Picture)]
    cpu, there = both(entry, items)
    for name in {"num_faces", "text_boxes"} & set(cpu):
        assert (cpu[name] == there[name]).mean() >= 0.9
    for name in {"text_area", "text_density"} & set(cpu):
        assert np.abs(cpu[name] - there[name]).max() < 0.03


def test_text_encoder(tmp_path: Path) -> None:
    """Guards against half precision or padding in text vectors."""
    tiny_bert(tmp_path)
    found = []
    for device in ("cpu", CUDA):
        (scorer,) = build({"x": {"scorer": "hf_text_embed", "model": str(tmp_path)}})
        assert isinstance(scorer, TextScorer)
        scorer.load(Device(device))
        found.append(np.asarray(scorer.score(TEXTS)["x_text"]))
    assert (found[0] * found[1]).sum(axis=1).min() > 0.999


def test_the_same_bits_twice_side_by_side(tmp_path: Path) -> None:
    """Guards against scores that depend on which scorer's kernels ran in between: resumed must equal undisturbed."""
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "w.safetensors")
    clip = {"scorer": "clip", "model": f"local-dir:{tiny_clip(tmp_path / 'clip')}"}
    net = {"scorer": "timm_embed", "model": "resnet10t", "weights": str(tmp_path / "w.safetensors"), "width": 512}
    items, found = pictures(), []
    for abreast in (True, False, True):
        scorers = [scorer for scorer in build({"c": clip, "n": net}) if isinstance(scorer, ImageScorer)]
        for scorer in scorers:
            scorer.load(Device(CUDA))
        prepared = [[scorer.prepare(item, "a thing") for scorer in scorers] for item in items]
        chunk = Chunk(len(items), list(range(len(items))))
        columns = Runner(scorers, [], Counter(), abreast=abreast).run(chunk, prepared)
        found.append(pa.table(columns))
    assert found[0].equals(found[1]) and found[0].equals(found[2])

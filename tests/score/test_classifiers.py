"""ONNX classifiers: shapes, order and scale of what the model is given; GantMan's five classes made one number."""

import os
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch.nn import functional

from curate.errors import WeightsError
from curate.score.classifiers import GantmanNsfw, OnnxClassifier
from tests.score.onnx_bytes import node, write_onnx

SHARED = os.environ.get("CURATE_SHARED")
GANTMAN = Path(SHARED or "") / "reference/nsfwjs_mobilenet_v2/nsfw_mobilenet_v2.derived.onnx"
needs_shared = pytest.mark.skipif(SHARED is None, reason="needs the nsfwjs model: set CURATE_SHARED")


def write_means(path: Path, *, channels_last: bool, batch: int | str = "n") -> Path:
    """A model whose three outputs are the means of the three channels that it was given."""
    sides: list[int | str] = [batch, 4, 6, 3] if channels_last else [batch, 3, 4, 6]
    if channels_last:  # [n, 4, 6, 3] x averaging weights: flatten the places, keep the channels
        nodes = [node("Flatten", ["x"], ["f"], axis=1), node("MatMul", ["f", "w"], ["y"])]
        weights = {"w": np.tile(np.eye(3), (24, 1)) / 24}
    else:
        nodes = [node("GlobalAveragePool", ["x"], ["g"]), node("Flatten", ["g"], ["y"], axis=1)]
        weights = {}
    return write_onnx(path, nodes, {"x": sides}, {"y": [batch, 3]}, weights)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("batch", ["n", 4])
def test_what_the_model_is_given(tmp_path: Path, channels_last: bool, batch: int | str) -> None:
    """BGR for RGB, 0..255 for 0..1, mixed axes, or a short last batch give plausible, wrong classes."""
    path = write_means(tmp_path / "means.onnx", channels_last=channels_last, batch=batch)
    pictures = [np.full((10 + i, 9, 3), (255, 51, 0), dtype=np.uint8) for i in range(5)]
    got = OnnxClassifier.from_file(path, ["r", "g", "b"], mean=(0.0, 0.0, 0.5), std=(1.0, 1.0, 0.5))(pictures)
    assert list(got) == ["p_r", "p_g", "p_b"]
    np.testing.assert_allclose(got["p_r"], np.full(5, 1.0), atol=1e-6)
    np.testing.assert_allclose(got["p_g"], np.full(5, 0.2), atol=1e-6)
    np.testing.assert_allclose(got["p_b"], np.full(5, -1.0), atol=1e-6)


def test_odd_pictures(tmp_path: Path) -> None:
    """Extreme shapes and greyscale are pictures too; an empty batch has no rows."""
    classifier = OnnxClassifier.from_file(write_means(tmp_path / "m.onnx", channels_last=True), ["r", "g", "b"])
    shapes = [(1, 1, 3), (1, 5000, 3), (30, 20), (30, 20, 1)]
    got = classifier([np.full(shape, 255, dtype=np.uint8) for shape in shapes])
    np.testing.assert_allclose(got["p_g"], np.ones(4), atol=1e-6)
    assert classifier([])["p_r"].shape == (0,)


def test_infinite_answers_are_no_value(tmp_path: Path) -> None:
    """A model that overflows must not leave infinity in a column."""
    nodes = [node("GlobalAveragePool", ["x"], ["g"]), node("Flatten", ["g"], ["f"], axis=1)]
    nodes.append(node("Div", ["f", "zero"], ["y"]))
    weights = {"zero": np.zeros(3, dtype=np.float32)}
    path = write_onnx(tmp_path / "inf.onnx", nodes, {"x": ["n", 3, 4, 4]}, {"y": ["n", 3]}, weights)
    got = OnnxClassifier.from_file(path, ["r", "g", "b"])([np.full((4, 4, 3), (255, 0, 255), dtype=np.uint8)])
    assert all(np.isnan(values).all() for values in got.values())


@needs_shared
def test_gantman() -> None:
    """The five probabilities add up, in the model's order, and the one number is porn + hentai."""
    files = sorted((Path(SHARED or "") / "realdata/images/text_none").glob("*.jpg"))[:12]
    pictures = [cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB) for file in files]
    got = GantmanNsfw.from_file(GANTMAN)(pictures)
    session = ort.InferenceSession(str(GANTMAN), providers=["CPUExecutionProvider"])
    planes = [torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 for picture in pictures]
    resized = [functional.interpolate(plane, (224, 224), mode="bilinear", align_corners=True) for plane in planes]
    batch = torch.cat(resized).permute(0, 2, 3, 1).contiguous().numpy()  # as nsfwjs's core.ts does it
    wanted = session.run(["probs"], {"image": batch})[0]
    classes = ["drawings", "hentai", "neutral", "porn", "sexy"]
    np.testing.assert_allclose(np.stack([got[f"nsfw_gantman_{name}"] for name in classes], axis=1), wanted, atol=1e-5)
    np.testing.assert_allclose(got["nsfw_score_gantman"], wanted[:, 1] + wanted[:, 3], atol=1e-5)
    assert np.median(got["nsfw_score_gantman"]) < 0.5


def test_another_file_is_refused(tmp_path: Path) -> None:
    """Too few labels, or a model without a fixed picture size, is named in the plan."""
    path = write_means(tmp_path / "m.onnx", channels_last=False)
    with pytest.raises(WeightsError, match="expected y with 5 numbers"):
        GantmanNsfw.from_file(path)
    with pytest.raises(WeightsError, match=r"none\.onnx"):
        OnnxClassifier.from_file(tmp_path / "none.onnx", ["a"])
    free = write_onnx(
        tmp_path / "free.onnx", [node("Identity", ["x"], ["y"])], {"x": ["n", 3, "h", "w"]}, {"y": ["n", 3, "h", 1]}, {}
    )
    with pytest.raises(WeightsError, match="fixed size"):
        OnnxClassifier.from_file(free, ["a"])

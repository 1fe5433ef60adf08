"""OpenNSFW: preprocessing as opennsfw2's, and the network against a second statement of it, by Keras' layer names."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from curate.errors import WeightsError
from curate.score.opennsfw2 import OpenNsfw, crop, normalise

h5py = pytest.importorskip("h5py", reason="the weights file is HDF5")

Weights = dict[str, dict[str, np.ndarray]]
FILTERS = [(32, 32, 128), (64, 64, 256), (128, 128, 512), (256, 256, 1024)]
BLOCKS = [3, 4, 6, 3]


def draw_weights() -> Weights:
    """Random weights under opennsfw2's names, in Keras' axes; normalisation far from the identity."""
    rng = np.random.default_rng(0)
    weights: Weights = {}

    def conv(name: str, kernel: int, inputs: int, outputs: int) -> None:
        scale = np.sqrt(2 / (kernel * kernel * inputs))
        weights[f"conv{name}"] = {
            "kernel": rng.normal(0, scale, (kernel, kernel, inputs, outputs)),
            "bias": rng.normal(0, 0.1, outputs),
        }
        weights[f"bn{name}"] = {
            "gamma": rng.uniform(0.3, 0.6, outputs),
            "beta": rng.normal(0, 0.1, outputs),
            "moving_mean": rng.normal(0, 0.1, outputs),
            "moving_variance": rng.uniform(0.5, 1.5, outputs),
        }

    conv("_1", 7, 3, 64)
    inputs = 64
    for stage, (filters, count) in enumerate(zip(FILTERS, BLOCKS, strict=True)):
        for block in range(count):
            name = f"_stage{stage}_block{block}"
            if block == 0:
                conv(f"{name}_proj_shortcut", 1, inputs, filters[2])
            conv(f"{name}_branch2a", 1, inputs, filters[0])
            conv(f"{name}_branch2b", 3, filters[0], filters[1])
            conv(f"{name}_branch2c", 1, filters[1], filters[2])
            inputs = filters[2]
    weights["bn_1"]["moving_variance"] *= 1e4  # pixels are about 100: keep the softmax from saturating
    weights["fc_nsfw"] = {"kernel": rng.normal(0, 0.2, (1024, 2)), "bias": rng.normal(0, 0.1, 2)}
    return {layer: {key: value.astype(np.float32) for key, value in part.items()} for layer, part in weights.items()}


def write_h5(path: Path, weights: Weights) -> Path:
    with h5py.File(path, "w") as file:
        for layer, arrays in weights.items():
            for key, value in arrays.items():
                file.create_dataset(f"{layer}/{layer}/{key}:0", data=value)
    return path


def same(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """TensorFlow's padding "same": the odd pixel goes to the right and below."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads)


def keras_forward(weights: Weights, x: torch.Tensor) -> np.ndarray:
    """opennsfw2/_model.py, layer by layer."""

    def conv_bn(name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
        conv, norm = weights[f"conv{name}"], {k: torch.tensor(v) for k, v in weights[f"bn{name}"].items()}
        kernel = torch.tensor(conv["kernel"]).permute(3, 2, 0, 1)
        padded = functional.pad(x, (3, 3, 3, 3)) if name == "_1" else same(x, kernel.shape[2], stride)
        y = functional.conv2d(padded, kernel, torch.tensor(conv["bias"]), stride)
        parts = (norm[k].view(1, -1, 1, 1) for k in ("moving_mean", "moving_variance", "gamma", "beta"))
        mean, variance, gamma, beta = parts
        return (y - mean) / torch.sqrt(variance + 1e-5) * gamma + beta

    x = torch.relu(conv_bn("_1", x, 2))
    x = functional.max_pool2d(same(x, 3, 2), 3, 2)
    for stage, count in enumerate(BLOCKS):
        for block in range(count):
            name, stride = f"_stage{stage}_block{block}", 2 if stage and not block else 1
            shortcut = x if block else conv_bn(f"{name}_proj_shortcut", x, stride)
            y = torch.relu(conv_bn(f"{name}_branch2a", x, stride))
            y = torch.relu(conv_bn(f"{name}_branch2b", y, 1))
            x = torch.relu(conv_bn(f"{name}_branch2c", y, 1) + shortcut)
    dense = weights["fc_nsfw"]
    logits = x.mean(dim=(2, 3)) @ torch.tensor(dense["kernel"]) + torch.tensor(dense["bias"])
    return torch.softmax(logits, dim=1)[:, 1].numpy()


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((310, 420)))
    return [smooth, rng.integers(0, 256, (100, 333, 3), dtype=np.uint8)]


def test_preprocessing_is_yahoos() -> None:
    """Without the JPEG round trip, the crop, or with RGB order, scores drift from COYO's column."""
    for picture in pictures():
        packed = io.BytesIO()
        Image.fromarray(picture).resize((256, 256), resample=Image.Resampling.BILINEAR).save(packed, format="JPEG")
        image = np.array(Image.open(packed)).astype(np.float32)[16:240, 16:240]
        wanted = image[:, :, ::-1] - np.array([104, 117, 123], dtype=np.float32)
        got = normalise(torch.from_numpy(crop(Image.fromarray(picture))[None]))[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(got, wanted)


def test_network_is_the_published_one(tmp_path: Path) -> None:
    """A stride, padding or axis in the wrong place still gives numbers between 0 and 1."""
    weights = draw_weights()
    scorer = OpenNsfw.from_h5(write_h5(tmp_path / "w.h5", weights))
    with torch.inference_mode():
        wanted = keras_forward(
            weights, normalise(torch.from_numpy(np.stack([crop(Image.fromarray(p)) for p in pictures()])))
        )
    got = scorer(pictures())["nsfw_score_opennsfw2"]
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert abs(got[0] - got[1]) > 1e-3 and 0.01 < got.min() < got.max() < 0.99
    for shape in ((1, 1, 3), (1, 500, 3), (30, 20)):
        assert np.isfinite(scorer([np.zeros(shape, dtype=np.uint8)])["nsfw_score_opennsfw2"]).all()
    assert scorer([])["nsfw_score_opennsfw2"].shape == (0,)


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    """Missing, damaged, incomplete or misshapen weights are named in the plan."""
    weights = draw_weights()
    del weights["bn_stage2_block3_branch2b"]["moving_mean"]
    write_h5(tmp_path / "short.h5", weights)
    other = draw_weights()
    other["fc_nsfw"]["kernel"] = np.zeros((1024, 5), dtype=np.float32)
    write_h5(tmp_path / "shape.h5", other)
    (tmp_path / "junk.h5").write_bytes(b"junk")
    for name in ("none.h5", "junk.h5", "short.h5", "shape.h5"):
        with pytest.raises(WeightsError, match=name):
            OpenNsfw.from_h5(tmp_path / name)

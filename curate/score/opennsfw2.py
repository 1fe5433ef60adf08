"""Yahoo's OpenNSFW (`nsfw_score_opennsfw2`), with opennsfw2's preprocessing, in torch.

The network (yahoo/open_nsfw, BSD-2; ResNet-50 "thin", 1 x 1 convolutions halved) is stated here after the published
Caffe definition and bhky/opennsfw2's Keras form, and reads its weights from opennsfw2's `open_nsfw_weights.h5` by
layer names. The published preprocessing is part of the score: resize to 256 x 256 bilinear, a JPEG round trip, centre
crop 224, BGR minus the channel means. opennsfw2's README warns that its torch backend answers otherwise; TensorFlow
pads the pooling on the right and below only, and so does this. Not compared with the published weights on the
project's machines: they were not at hand; what is tested is the mapping, the padding and the preprocessing.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import WeightsError
from curate.score.canvas import Float32, Uint8, as_rgb
from curate.score.pixels import in_parts, mixed, moved

BGR_MEAN = (104.0, 117.0, 123.0)
RESIZED, CROPPED = 256, 224
EPSILON = 1e-5  # of batch normalisation, Caffe's default
STAGES = ((3, 32, 128, 1), (4, 64, 256, 2), (6, 128, 512, 2), (3, 256, 1024, 2))  # blocks, inner, outer, stride


def crop(image: Image.Image) -> Uint8:
    """uint8 [224, 224, 3] of an RGB picture: resized, through JPEG (Pillow's quality 75, as there), centre cut."""
    resized = image.resize((RESIZED, RESIZED), resample=Image.Resampling.BILINEAR)
    packed = io.BytesIO()
    resized.save(packed, format="JPEG")
    packed.seek(0)
    pixels = np.asarray(Image.open(packed), dtype=np.uint8)
    start = (RESIZED - CROPPED) // 2
    return np.ascontiguousarray(pixels[start : start + CROPPED, start : start + CROPPED])


def normalise(crops: Tensor) -> Tensor:
    """uint8 RGB [N, 224, 224, 3] to float32 BGR [N, 3, 224, 224] minus the means (`Preprocessing.YAHOO` there)."""
    means = torch.tensor(BGR_MEAN, dtype=torch.float32, device=crops.device).view(1, 3, 1, 1)
    return crops.permute(0, 3, 1, 2).flip(1).to(torch.float32) - means


class _Conv(nn.Sequential):
    """Convolution, batch normalisation, and ReLU where the network has one after it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, *, relu: bool) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2)
        norm = nn.BatchNorm2d(outputs, eps=EPSILON)
        super().__init__(conv, norm, *([nn.ReLU()] if relu else []))


class _Block(nn.Module):
    """Bottleneck; `shortcut` is a convolution where the shape changes, else the identity."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, *, project: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _Conv(inputs, inner, 1, stride, relu=True),  # the stride is in the first 1 x 1, as in Caffe's ResNet
            _Conv(inner, inner, 3, 1, relu=True),
            _Conv(inner, outputs, 1, 1, relu=False),
        )
        self.shortcut: nn.Module = _Conv(inputs, outputs, 1, stride, relu=False) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.branch(x))


class OpenNsfwNet(nn.Module):
    """The network: float32 [N, 3, 224, 224] to softmax [N, 2] = (safe, not safe)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, 64, 7, 2, relu=True)
        blocks, inputs = [], 64
        for count, inner, outputs, stride in STAGES:
            for index in range(count):
                blocks.append(_Block(inputs, inner, outputs, stride if index == 0 else 1, project=index == 0))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        padded = functional.pad(self.stem(x), (0, 1, 0, 1))  # after ReLU, 0 is as good as minus infinity
        features = self.blocks(functional.max_pool2d(padded, 3, 2)).mean(dim=(2, 3))
        return torch.softmax(self.head(features), dim=1)

    def keras_layers(self) -> Iterator[tuple[str, nn.Conv2d | nn.BatchNorm2d | nn.Linear]]:
        """(opennsfw2's layer name, module that holds its weights)."""
        yield from _pair("_1", self.stem)
        at = 0
        for stage, (count, *_) in enumerate(STAGES):
            for index in range(count):
                block, where = self.blocks[at], f"_stage{stage}_block{index}"
                at += 1
                if not isinstance(block, _Block):
                    raise TypeError(f"block {at} is {type(block)}")
                for letter, part in zip("abc", block.branch, strict=True):
                    yield from _pair(f"{where}_branch2{letter}", part)
                if isinstance(block.shortcut, _Conv):
                    yield from _pair(f"{where}_proj_shortcut", block.shortcut)
        yield "fc_nsfw", self.head


def _pair(suffix: str, part: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.BatchNorm2d | nn.Linear]]:
    conv, norm = list(part.children())[:2]
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
        raise TypeError(f"{suffix} is not a convolution with its normalisation")
    yield f"conv{suffix}", conv
    yield f"bn{suffix}", norm


class OpenNsfw:
    """`nsfw_score_opennsfw2` of pictures."""

    def __init__(self, net: OpenNsfwNet, *, device: str, batch_size: int) -> None:
        self._net = net.to(device).eval()
        self._device = device
        self._batch_size = batch_size

    @classmethod
    def from_h5(cls, path: Path | str, *, device: str = "cpu", batch_size: int = 32) -> "OpenNsfw":
        """Read `open_nsfw_weights.h5`.

        Raises WeightsError when the file is missing, is not it, or h5py is not installed.
        """
        net = OpenNsfwNet()
        weights = _read_h5(path)
        state = {}
        for name, layer in net.keras_layers():
            for parameter, value in _parameters(layer, weights.get(name, {})).items():
                state[layer, parameter] = value
        for (layer, parameter), value in state.items():
            target = getattr(layer, parameter)
            if value is None or tuple(value.shape) != tuple(target.shape):
                got = "nothing" if value is None else list(value.shape)
                raise WeightsError(f"{path} is not OpenNSFW: {got} for {parameter} of shape {list(target.shape)}")
            with torch.no_grad():
                target.copy_(torch.from_numpy(np.ascontiguousarray(value)))
        return cls(net, device=device, batch_size=batch_size)

    def __call__(self, images: Sequence[Uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """`nsfw_score_opennsfw2` float32 [N] in 0..1 of uint8 RGB pictures [h, w, 3]."""
        return self.score([crop(Image.fromarray(as_rgb(image))) for image in images])

    def score(self, crops: Sequence[Uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """The column of crops that `crop` made; a score that is not finite is NaN, no value."""
        if not crops:
            return {"nsfw_score_opennsfw2": np.zeros(0, dtype=np.float32)}
        return {"nsfw_score_opennsfw2": in_parts(crops, self._batch_size, self._forward)}

    def _forward(self, part: Sequence[Uint8]) -> Tensor:
        batch = moved(torch.from_numpy(np.stack(part)), torch.device(self._device))
        with torch.inference_mode(), mixed(self._device):
            return cast(Tensor, self._net(normalise(batch)))[:, 1]


def _parameters(
    layer: nn.Conv2d | nn.BatchNorm2d | nn.Linear, found: Mapping[str, Float32]
) -> dict[str, Float32 | None]:
    """Keras arrays of one layer under torch's names and axes; None for what is missing."""
    if isinstance(layer, nn.BatchNorm2d):
        names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
        return {ours: found.get(theirs) for ours, theirs in names.items()}
    kernel = found.get("kernel")
    axes = (3, 2, 0, 1) if isinstance(layer, nn.Conv2d) else (1, 0)
    fits = kernel is not None and kernel.ndim == len(axes)
    return {"weight": kernel.transpose(axes) if kernel is not None and fits else None, "bias": found.get("bias")}


def _read_h5(path: Path | str) -> dict[str, dict[str, Float32]]:
    """Layer name -> array name -> float32 array, of a Keras weights file. Raises WeightsError."""
    try:
        import h5py  # noqa: PLC0415  # only this scorer needs it
    except ImportError as cause:
        raise WeightsError(f"{path} is an HDF5 file: pip install h5py") from cause
    layers: dict[str, dict[str, Float32]] = {}

    def collect(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            folders = name.split("/")  # [model_weights/]conv_1/conv_1/kernel:0
            layer, array = folders[-2], folders[-1].split(":")[0]
            layers.setdefault(layer, {})[array] = np.asarray(item[()], dtype=np.float32)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(collect)
    except (OSError, ValueError, IndexError, RuntimeError) as cause:
        raise WeightsError(f"{path} is missing or is not a Keras weights file: {cause}") from cause
    return layers

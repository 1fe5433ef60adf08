"""The networks of `vision.py`, loaded: an image in, one row of float32 numbers out.

Each `open_*` gives a VisionModel: `prepare` on CPU threads, `run` on the device. Mixed precision on a GPU only.
Weights are safetensors, tensors read with `weights_only=True`, TorchScript or ONNX; no pickled code is run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import timm
import torch
from safetensors.torch import load_file
from torchvision import transforms
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from curate.errors import ConfigError, WeightsError
from curate.score.decode import Picture
from curate.score.detectors import providers
from curate.score.onnx_session import open_session
from curate.score.pixels import Mode, Pixels, in_parts, mixed, moved
from curate.score.scorer import Device, Float32
from curate.score.vision import FileSettings, TorchScriptSettings

Input = npt.NDArray[Any]

# Untyped in their libraries.
_PROCESSORS: Any = AutoImageProcessor
_TIMM_DATA: Any = timm.data
_JIT: Any = torch.jit


@dataclass(frozen=True)
class VisionModel:
    """`prepare`: a picture to the network's input of one, small; `run`: those, so many at a time, to float32 [N, d]."""

    prepare: Callable[[Picture], Input]
    run: Callable[[Sequence[Input], int], Float32]


def open_hf_classifier(source: str, mode: Mode, device: Device) -> VisionModel:
    """Probabilities in the order of the configuration's labels."""
    processor = _PROCESSORS.from_pretrained(source, trust_remote_code=False)
    model = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=False, use_safetensors=True)
    several = model.config.problem_type == "multi_label_classification"

    def head(outputs: Any) -> torch.Tensor:
        logits = outputs.logits.float()
        return cast(torch.Tensor, logits.sigmoid() if several else logits.softmax(dim=-1))

    return _processed(processor, mode, _torch(model, head, device), device)


def open_hf_embedder(source: str, mode: Mode, device: Device) -> VisionModel:
    """Unit class tokens after the last normalisation: what DINOv2's and Web-SSL's cards use as image features."""
    processor = _PROCESSORS.from_pretrained(source, trust_remote_code=False)
    model = AutoModel.from_pretrained(source, trust_remote_code=False, use_safetensors=True)

    def head(outputs: Any) -> torch.Tensor:
        return _unit(outputs.last_hidden_state[:, 0])

    return _processed(processor, mode, _torch(model, head, device), device)


def open_timm(name: str, weights: Path, classes: int, mode: Mode, device: Device) -> VisionModel:
    """Softmax over `classes`, or unit features when 0, after timm's evaluation transform. Raises WeightsError."""
    try:
        model = timm.create_model(name, pretrained=False, num_classes=classes)
    except RuntimeError as error:
        raise ConfigError(f"timm has no such model: {error}") from None
    state = _tensors(weights)
    wanted = model.state_dict()
    kept = {key: value for key, value in state.items() if key in wanted and value.shape == wanted[key].shape}
    missing = sorted(set(wanted) - set(kept))
    if missing:
        raise WeightsError(f"{weights} is not a {name} of {classes} classes: no fitting {', '.join(missing[:3])}")
    model.load_state_dict(kept)
    transform = _TIMM_DATA.create_transform(**_TIMM_DATA.resolve_model_data_config(model), is_training=False)

    def head(outputs: torch.Tensor) -> torch.Tensor:
        return outputs.float().softmax(dim=-1) if classes else _unit(outputs)

    return _split(transform, mode, model, head, device)


def open_torchscript(weights: Path, settings: TorchScriptSettings, device: Device) -> VisionModel:
    """Unit vectors of a TorchScript network. Raises WeightsError."""
    try:
        model = _JIT.load(str(weights), map_location="cpu")
    except RuntimeError as error:
        raise WeightsError(f"{weights} is not a TorchScript file: {str(error).splitlines()[0]}") from None
    return _split(_squared(settings), settings.preprocess, model, _unit, device)


def open_onnx(weights: Path, settings: FileSettings, output: str | None, unit: bool, device: Device) -> VisionModel:
    """The output as it is, or as unit vectors; [N, h, w, 3] or [N, 3, h, w], of bytes or floats, as the file says."""
    session = open_session(weights, threads=device.threads, providers=providers(device))
    _refuse_unfit(session, weights, settings, output)
    taken = session.get_inputs()[0]
    last, whole = taken.shape[-1] == 3, taken.type == "tensor(uint8)"
    transform = _squared(settings, whole=whole)
    names = [output] if output else [session.get_outputs()[0].name]

    def run(prepared: Sequence[Input], size: int) -> Float32:
        batch = np.stack(prepared)
        batch = np.ascontiguousarray(batch.transpose(0, 2, 3, 1)) if last else batch
        fixed = taken.shape[0] if isinstance(taken.shape[0], int) else min(size, len(batch))
        rows = [
            _run_fixed(session, names, taken.name, batch[at : at + fixed], fixed) for at in range(0, len(batch), fixed)
        ]
        numbers = np.concatenate(rows)
        if unit:
            wide = numbers.astype(np.float64)  # squares of float32 overflow, and the quotient was a vector of zeros
            numbers = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
        return numbers.astype(np.float32)

    return VisionModel(lambda picture: np.asarray(transform(picture.rgb)), run)


def _refuse_unfit(session: ort.InferenceSession, weights: Path, settings: FileSettings, output: str | None) -> None:
    """Raises WeightsError for a network that does not take one picture as the entry says, or lacks its output."""
    shapes, given = [one.shape for one in session.get_inputs()], [one.name for one in session.get_outputs()]
    side = settings.side
    fits = len(shapes) == 1 and len(shapes[0]) == 4 and 3 in (shapes[0][1], shapes[0][3])
    sides = [] if not fits else shapes[0][1:3] if shapes[0][3] == 3 else shapes[0][2:]
    if not fits or any(isinstance(one, int) and one != side for one in sides):
        raise WeightsError(f"{weights} takes {shapes}, expected one input of pictures, {side} x {side} (`side`)")
    if output and output not in given:
        raise WeightsError(f"{weights} has no output {output!r}; there are {', '.join(given)}")


def _run_fixed(session: ort.InferenceSession, names: list[str], taken: str, batch: Input, fixed: int) -> Float32:
    """One call with exactly `fixed` rows; those that fill it up are cut off again."""
    count = len(batch)
    filled = batch if count == fixed else np.concatenate([batch, np.repeat(batch[-1:], fixed - count, axis=0)])
    (found,) = session.run(names, {taken: filled})
    numbers = np.asarray(found, dtype=np.float32)
    if numbers.ndim == 0 or len(numbers) != fixed:  # reshaping would deal one picture's numbers out to others
        raise ConfigError(f"the network gives {list(numbers.shape)} for {fixed} pictures, expected a row each")
    return numbers.reshape(fixed, -1)[:count]


def _split(
    transform: transforms.Compose, mode: Mode, model: Any, head: Callable[[Any], torch.Tensor], device: Device
) -> VisionModel:
    """A network whose transform is split: bytes to the device, numbers there."""
    pixels, run = Pixels(transform, device.name), _torch(model, head, device)

    def prepare(picture: Picture) -> Input:
        return picture.once(pixels.name, lambda: pixels.resized(picture.rgb)) if mode == "exact" else picture.pixels

    return VisionModel(
        prepare, lambda prepared, size: in_parts(prepared, size, lambda part: run(pixels.batch(part, mode)))
    )


def _torch(model: Any, head: Callable[[Any], torch.Tensor], device: Device) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network and its head on a batch that lies on the device; the answer stays there."""
    torch.set_num_threads(device.threads)
    model = model.eval().to(device.name)
    if device.name == "cuda" and not isinstance(model, torch.jit.ScriptModule):
        model = model.to(memory_format=torch.channels_last)

    def run(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), mixed(device.name):
            return head(model(batch))

    return run


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


def _processed(processor: Any, mode: Mode, run: Callable[[torch.Tensor], torch.Tensor], device: Device) -> VisionModel:
    """A network behind an image processor of `transformers`.

    `exact`: resized and cut on CPU threads; bytes cross the bus, and are normalised there where the processor does no
    more than that with them. `fast`: the decoded picture crosses, and the processor runs on the device.
    """
    there = torch.device(device.name)
    split = getattr(processor, "do_rescale", False) and getattr(processor, "do_normalize", False)
    kept = {"do_rescale": False, "do_normalize": False} if split else {}
    scale = 1 / processor.rescale_factor if split else 1.0
    mean, std = (
        torch.tensor(value, device=there).view(1, -1, 1, 1) * scale
        for value in ((processor.image_mean, processor.image_std) if split else ([0.0], [1.0]))
    )

    def prepare(picture: Picture) -> Input:
        if mode == "fast":
            return picture.pixels
        return cast(Input, processor(images=picture.rgb, return_tensors="np", **kept)["pixel_values"][0])

    def forward(part: Sequence[Input]) -> torch.Tensor:
        if mode == "fast":
            images = [moved(torch.from_numpy(np.array(pixels)), there).permute(2, 0, 1) for pixels in part]
            return run(processor(images=images, return_tensors="pt", device=device.name)["pixel_values"])
        return run((moved(torch.from_numpy(np.stack(part)), there).float() - mean) / std)

    return VisionModel(prepare, lambda prepared, size: in_parts(prepared, size, forward))


def _squared(settings: FileSettings, *, whole: bool = False) -> transforms.Compose:
    """To float32 [3, side, side] as the settings say, or uint8 where `whole`."""
    side = settings.side
    steps: list[Any] = [transforms.Resize((side, side))]
    if settings.resize == "crop":
        steps = [transforms.Resize(side), transforms.CenterCrop(side)]
    steps += [transforms.PILToTensor()] if whole else [
        transforms.ToTensor(), transforms.Normalize(settings.mean, settings.std)
    ]  # fmt: skip
    return transforms.Compose(steps)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip and runtime errors of many classes here
        raise WeightsError(f"{path} is not a file of tensors alone: {error}") from None
    state = found.get("state_dict", found) if isinstance(found, dict) else {}
    return {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}

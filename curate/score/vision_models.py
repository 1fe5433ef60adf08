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
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from curate.errors import WeightsError
from curate.score.onnx_session import open_session
from curate.score.scorer import Device, Float32
from curate.score.vision import FileSettings

Pixels = npt.NDArray[Any]

# Untyped in their libraries.
_PROCESSORS: Any = AutoImageProcessor
_TIMM_DATA: Any = timm.data
_JIT: Any = torch.jit


@dataclass(frozen=True)
class VisionModel:
    """`prepare`: an RGB image to the network's input of one; `run`: those to float32 [N, d]."""

    prepare: Callable[[Image.Image], Pixels]
    run: Callable[[Sequence[Pixels]], Float32]


def open_hf_classifier(source: str, device: Device) -> VisionModel:
    """Probabilities in the order of the configuration's labels."""
    processor = _PROCESSORS.from_pretrained(source)
    model = AutoModelForImageClassification.from_pretrained(source, use_safetensors=True)
    several = model.config.problem_type == "multi_label_classification"

    def head(outputs: Any) -> torch.Tensor:
        logits = outputs.logits.float()
        return cast(torch.Tensor, logits.sigmoid() if several else logits.softmax(dim=-1))

    return VisionModel(_processed(processor), _torch(model, head, device))


def open_hf_embedder(source: str, device: Device) -> VisionModel:
    """Unit class tokens after the last normalisation: what DINOv2's and Web-SSL's cards use as image features."""
    processor = _PROCESSORS.from_pretrained(source)
    model = AutoModel.from_pretrained(source, use_safetensors=True)

    def head(outputs: Any) -> torch.Tensor:
        return _unit(outputs.last_hidden_state[:, 0])

    return VisionModel(_processed(processor), _torch(model, head, device))


def open_timm(name: str, weights: Path, classes: int, device: Device) -> VisionModel:
    """Softmax over `classes`, or unit features when 0, after timm's evaluation transform. Raises WeightsError."""
    model = timm.create_model(name, pretrained=False, num_classes=classes)
    state = load_file(weights) if weights.suffix == ".safetensors" else _tensors(weights)
    wanted = model.state_dict()
    kept = {key: value for key, value in state.items() if key in wanted and value.shape == wanted[key].shape}
    missing = sorted(set(wanted) - set(kept))
    if missing:
        raise WeightsError(f"{weights} is not a {name} of {classes} classes: no fitting {', '.join(missing[:3])}")
    model.load_state_dict(kept)
    transform = _TIMM_DATA.create_transform(**_TIMM_DATA.resolve_model_data_config(model), is_training=False)

    def head(outputs: torch.Tensor) -> torch.Tensor:
        return outputs.float().softmax(dim=-1) if classes else _unit(outputs)

    return VisionModel(lambda image: np.asarray(transform(image)), _torch(model, head, device))


def open_torchscript(weights: Path, settings: FileSettings, device: Device) -> VisionModel:
    """Unit vectors of a TorchScript network. Raises WeightsError."""
    try:
        model = _JIT.load(str(weights), map_location="cpu")
    except RuntimeError as error:
        raise WeightsError(f"{weights} is not a TorchScript file: {str(error).splitlines()[0]}") from None
    return VisionModel(_squared(settings), _torch(model, _unit, device))


def open_onnx(weights: Path, settings: FileSettings, output: str | None, unit: bool, device: Device) -> VisionModel:
    """The output as it is, or as unit vectors; [N, h, w, 3] or [N, 3, h, w], of bytes or floats, as the file says."""
    providers = ("CUDAExecutionProvider",) if device.name == "cuda" else ()
    session = open_session(weights, threads=device.threads, providers=(*providers, "CPUExecutionProvider"))
    taken = session.get_inputs()[0]
    last, whole = taken.shape[-1] == 3, taken.type == "tensor(uint8)"
    squared = _squared(settings, whole=whole)
    names = [output] if output else [session.get_outputs()[0].name]

    def run(prepared: Sequence[Pixels]) -> Float32:
        batch = np.stack(prepared)
        batch = np.ascontiguousarray(batch.transpose(0, 2, 3, 1)) if last else batch
        fixed = taken.shape[0] if isinstance(taken.shape[0], int) else len(batch)
        rows = [
            _run_fixed(session, names, taken.name, batch[at : at + fixed], fixed) for at in range(0, len(batch), fixed)
        ]
        numbers = np.concatenate(rows)
        if unit:
            numbers = numbers / np.maximum(np.linalg.norm(numbers, axis=1, keepdims=True), 1e-12)
        return numbers.astype(np.float32)

    return VisionModel(squared, run)


def _run_fixed(session: ort.InferenceSession, names: list[str], taken: str, batch: Pixels, fixed: int) -> Float32:
    """One call with exactly `fixed` rows; those that fill it up are cut off again."""
    count = len(batch)
    filled = batch if count == fixed else np.concatenate([batch, np.repeat(batch[-1:], fixed - count, axis=0)])
    (found,) = session.run(names, {taken: filled})
    return np.asarray(found, dtype=np.float32).reshape(fixed, -1)[:count]


def _torch(model: Any, head: Callable[[Any], torch.Tensor], device: Device) -> Callable[[Sequence[Pixels]], Float32]:
    torch.set_num_threads(device.threads)
    model = model.eval().to(device.name)
    on_gpu = device.name == "cuda"
    if on_gpu and not isinstance(model, torch.jit.ScriptModule):
        model = model.to(memory_format=torch.channels_last)

    def run(prepared: Sequence[Pixels]) -> Float32:
        batch = torch.from_numpy(np.stack(prepared))
        if on_gpu:
            batch = batch.pin_memory().to(device.name, non_blocking=True, memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast(device.name, dtype=torch.float16, enabled=on_gpu):
            return cast(Float32, head(model(batch)).float().cpu().numpy())

    return run


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


def _processed(processor: Any) -> Callable[[Image.Image], Pixels]:
    def prepare(image: Image.Image) -> Pixels:
        return cast(Pixels, processor(images=image, return_tensors="np")["pixel_values"][0].astype(np.float32))

    return prepare


def _squared(settings: FileSettings, *, whole: bool = False) -> Callable[[Image.Image], Pixels]:
    """float32 [3, side, side] as the settings say, or uint8 where `whole`."""
    side = settings.side
    steps: list[Any] = [transforms.Resize((side, side))]
    if settings.resize == "crop":
        steps = [transforms.Resize(side), transforms.CenterCrop(side)]
    steps += [transforms.PILToTensor()] if whole else [
        transforms.ToTensor(), transforms.Normalize(settings.mean, settings.std)
    ]  # fmt: skip
    transform = transforms.Compose(steps)
    return lambda image: np.asarray(transform(image))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip and runtime errors of many classes here
        raise WeightsError(f"{path} is not a torch file of tensors alone: {error}") from None
    state = found.get("state_dict", found) if isinstance(found, dict) else {}
    return {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}

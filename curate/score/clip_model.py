"""An open_clip model loaded: pixels and tokens in, unit vectors out.

`exact` runs open_clip's own preprocess up to its ToTensor on the CPU and the rest, the same arithmetic, on the device
in one go, so that pixels cross the bus as bytes. `fast` moves the decoded picture and resizes there (antialiased).
Mixed precision on a GPU only; vectors are normalised, and cosines taken, in float32. No gradient, no pickle.
"""

from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from PIL import Image
from torch.nn import functional
from torchvision import transforms

from curate.errors import PlanError
from curate.score.clip_source import ClipSource
from curate.score.scorer import Device

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TEXT_BATCH = 256

Float32 = npt.NDArray[np.float32]
Uint8 = npt.NDArray[np.uint8]


class ClipModel:
    """Both towers on one device."""

    def __init__(
        self, model: Any, preprocess: transforms.Compose, tokenizer: Any, device: Device, precision: str
    ) -> None:
        self._device = torch.device(device.name)
        self._dtype = DTYPES.get("fp16" if precision == "auto" else precision) if device.name == "cuda" else None
        self._model = model.eval().requires_grad_(False).to(self._device)
        if self._dtype is not None:
            self._model = self._model.to(memory_format=torch.channels_last)
        self._tokenizer = tokenizer
        self._tokenizing = Lock()  # tokenizers of the hub refuse a second thread ("Already borrowed")
        steps = list(preprocess.transforms)
        at = next(number for number, step in enumerate(steps) if isinstance(step, transforms.ToTensor))
        normalize = steps[-1]
        if at != len(steps) - 2 or not isinstance(normalize, transforms.Normalize):
            raise PlanError(f"unexpected preprocessing of open_clip: {preprocess}")
        self._resize = transforms.Compose(steps[:at])
        self._steps = steps[:at]
        self.resize_name = str(self._resize)  # equal where two models see the same pixels
        self._mean = torch.tensor(normalize.mean, device=self._device).view(1, 3, 1, 1)
        self._std = torch.tensor(normalize.std, device=self._device).view(1, 3, 1, 1)

    def pixels(self, image: Image.Image) -> Uint8:
        """open_clip's resize and crop of an RGB image: uint8 [h, w, 3]."""
        return np.asarray(self._resize(image))

    def tokens(self, text: str) -> npt.NDArray[np.int64]:
        """Token numbers, int64 [context]."""
        with self._tokenizing:
            return cast(npt.NDArray[np.int64], self._tokenizer([text])[0].numpy())

    def embed_images(self, pixels: Sequence[Uint8], preprocess: str) -> Float32:
        """Unit vectors float32 [N, d] of pictures as `pixels` gives them (exact) or of any size (fast)."""
        if preprocess == "exact":
            batch = self._to_device(torch.from_numpy(np.stack(pixels))).permute(0, 3, 1, 2)
        else:
            batch = torch.stack([self._resize_on_device(picture) for picture in pixels])
        with torch.inference_mode():
            # torchvision's ToTensor and Normalize, in their order, so that float32 results have the same bits.
            batch = batch.contiguous().to(torch.float32).div(255).sub_(self._mean).div_(self._std)
            if self._dtype is not None:
                batch = batch.contiguous(memory_format=torch.channels_last)
            with self._autocast():
                features = self._model.encode_image(batch)
            return _unit(features)

    def embed_texts(self, tokens: npt.NDArray[np.int64]) -> Float32:
        """Unit vectors float32 [N, d] of int64 [N, context]."""
        parts = []
        with torch.inference_mode():
            for start in range(0, len(tokens), TEXT_BATCH):
                batch = self._to_device(torch.from_numpy(tokens[start : start + TEXT_BATCH]))
                with self._autocast():
                    parts.append(_unit(self._model.encode_text(batch)))
        return np.concatenate(parts)

    @property
    def scale(self) -> float:
        """By which cosines are multiplied before a softmax."""
        return float(self._model.logit_scale.exp())

    def probabilities(self, cosines: Sequence[float | None]) -> list[float | None]:
        """SigLIP's sigmoid(scale · cosine + bias) of each cosine."""
        scale, bias = self.scale, float(self._model.logit_bias)
        return [None if cosine is None else float(1 / (1 + np.exp(-(scale * cosine + bias)))) for cosine in cosines]

    def _autocast(self) -> torch.autocast:
        on = self._dtype is not None
        return torch.autocast(self._device.type, dtype=self._dtype, enabled=on)

    def _to_device(self, batch: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return batch
        return batch.pin_memory().to(self._device, non_blocking=True)

    def _resize_on_device(self, picture: Uint8) -> torch.Tensor:
        """uint8 [3, h, w] by the same steps as `pixels`, on the device's antialiased kernels."""
        image = self._to_device(torch.from_numpy(np.array(picture))).permute(2, 0, 1)
        for step in self._steps:
            if isinstance(step, transforms.Resize):
                image = _resized(image, step)
            elif isinstance(step, transforms.CenterCrop):
                image = step(image)
            elif type(step).__name__ != "MaybeConvertMode":  # the picture is RGB already
                raise PlanError(f"preprocess: fast cannot do {type(step).__name__}; use preprocess: exact")
        return image


def _resized(image: torch.Tensor, step: transforms.Resize) -> torch.Tensor:
    """torchvision's Resize of uint8 [3, h, w], rounded to uint8 again as Pillow does."""
    height, width = image.shape[1:]
    if isinstance(step.size, int) or len(step.size) == 1:
        short = step.size if isinstance(step.size, int) else step.size[0]
        long = int(short * max(height, width) / min(height, width))
        size = [short, long] if height <= width else [long, short]
    else:
        size = list(step.size)
    mode = "bicubic" if step.interpolation == transforms.InterpolationMode.BICUBIC else "bilinear"
    wide = functional.interpolate(image[None].float(), size=size, mode=mode, antialias=True, align_corners=False)
    return wide[0].round_().clamp_(0, 255).to(torch.uint8)


def _unit(features: torch.Tensor) -> Float32:
    """Rows of length 1 as float32 on the CPU; `clone` because an inference tensor's memory is reused by no one else."""
    return cast(Float32, functional.normalize(features.float(), dim=-1).cpu().numpy())


@lru_cache(maxsize=8)
def _open(model: str, pretrained: str | None) -> tuple[Any, Any, Any]:
    created, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained)
    return created, preprocess, open_clip.get_tokenizer(model)


def open_model(source: ClipSource, device: Device, precision: str) -> ClipModel:
    """Load a checked source; scorers of one process that name the same model share its weights."""
    if source.folder:
        model, preprocess, tokenizer = _open(f"local-dir:{source.folder}", None)
    elif source.file:
        model, preprocess, tokenizer = _open(source.model, str(source.file))
    else:
        model, preprocess, tokenizer = _open(source.model, source.pretrained)
    torch.set_num_threads(device.threads)  # not what the engine happens to allow: the count changes the last bits
    return ClipModel(model, preprocess, tokenizer, device, precision)

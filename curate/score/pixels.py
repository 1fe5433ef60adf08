"""How a picture becomes a network's input: a library's own transform, split where bytes become numbers.

`exact` runs the transform up to its ToTensor on the CPU, with Pillow, and the rest, the same arithmetic, on the device
in one go, so that pixels cross the bus as bytes. `fast` moves the decoded picture and resizes there (antialiased).
Refuses transforms with other steps.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional
from torchvision import transforms

from curate.errors import PlanError

Uint8 = npt.NDArray[np.uint8]
Mode = Literal["exact", "fast"]
Row = TypeVar("Row")


class Pixels:
    """One transform on one device. `name` is equal where two networks see the same pixels."""

    def __init__(self, transform: transforms.Compose, device: str) -> None:
        """Raises PlanError unless the transform ends in ToTensor and Normalize."""
        self._device = torch.device(device)
        steps = list(transform.transforms)
        normalize = steps[-1]
        if not isinstance(normalize, transforms.Normalize) or not isinstance(steps[-2], transforms.ToTensor):
            raise PlanError(f"unexpected preprocessing: {transform}")
        self._steps = steps[:-2]
        self._resize = transforms.Compose(self._steps)
        self.name = str(self._resize)
        self._mean = torch.as_tensor(normalize.mean, device=self._device).view(1, 3, 1, 1)
        self._std = torch.as_tensor(normalize.std, device=self._device).view(1, 3, 1, 1)

    def resized(self, image: Image.Image) -> Uint8:
        """The transform's resize and crop of an RGB image: uint8 [h, w, 3]."""
        return np.asarray(self._resize(image))

    def batch(self, pictures: Sequence[Uint8], mode: Mode) -> torch.Tensor:
        """float32 [N, 3, h, w] on the device, of pictures as `resized` gives them (exact) or of any size (fast)."""
        if mode == "exact":
            batch = moved(torch.from_numpy(np.stack(pictures)), self._device).permute(0, 3, 1, 2)
        else:
            batch = torch.stack([self._resized_there(picture) for picture in pictures])
        # torchvision's ToTensor and Normalize, in their order, so that float32 results have the same bits.
        batch = batch.contiguous().to(torch.float32).div(255).sub_(self._mean).div_(self._std)
        return batch.contiguous(memory_format=torch.channels_last) if self._device.type == "cuda" else batch

    def _resized_there(self, picture: Uint8) -> torch.Tensor:
        """uint8 [3, h, w] by the same steps as `resized`, on the device's antialiased kernels."""
        image = moved(torch.from_numpy(np.array(picture)), self._device).permute(2, 0, 1)
        for step in self._steps:
            if isinstance(step, transforms.Resize):
                image = _resized(image, step)
            elif isinstance(step, transforms.CenterCrop):
                image = step(image)
            elif type(step).__name__ != "MaybeConvertMode":  # the picture is RGB already
                raise PlanError(f"preprocess: fast cannot do {type(step).__name__}; use preprocess: exact")
        return image


def moved(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device, through pinned memory, so that the copy runs beside the host's work."""
    return batch if device.type == "cpu" else batch.pin_memory().to(device, non_blocking=True)


def in_parts(rows: Sequence[Row], size: int, call: Callable[[Sequence[Row]], torch.Tensor]) -> npt.NDArray[np.float32]:
    """`call` on `size` rows at a time, as float32 on the host.

    Nothing waits for the device before its last part is queued, so that the host puts the next part together, and
    moves it, while the device works on this one.
    """
    parts = [call(rows[start : start + size]).float() for start in range(0, len(rows), size)]
    return np.asarray(torch.cat(parts).cpu().numpy(), dtype=np.float32)


def mixed(device: str) -> torch.autocast:
    """float16 where it is safe on a GPU; float32 on a CPU."""
    return torch.autocast(device, dtype=torch.float16, enabled=device == "cuda")


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

"""`watermark_score`: LAION's watermark detector (LAION-AI/LAION-5B-WatermarkDetection, MIT).

EfficientNet-B3 by timm with a head of three dense layers, on the picture stretched to 256 x 256. Index 0 of the
softmax is *watermark* (example_use.py:54), which invites the opposite reading. Both published layouts of the
checkpoint are read: a plain state_dict (example_use.py) and one under the key "weights" (inference.py).
Loaded with `weights_only=True`: no pickled code runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from curate.errors import WeightsError
from curate.score.canvas import Uint8, as_rgb
from curate.score.pixels import in_parts, mixed, moved

SIDE = 256
WATERMARK = 0  # index in the softmax; 1 is clear
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_net() -> nn.Module:
    """EfficientNet-B3 with the published head, untrained (timm's `efficientnet_b3a` is now `efficientnet_b3`)."""
    net: nn.Module = timm.create_model("efficientnet_b3", pretrained=False, num_classes=2)
    net.classifier = nn.Sequential(
        nn.Linear(1536, 625), nn.ReLU(), nn.Dropout(0.3), nn.Linear(625, 256), nn.ReLU(), nn.Linear(256, 2)
    )
    return net


def stretch(image: Image.Image) -> Uint8:
    """uint8 RGB [256, 256, 3]: torchvision's Resize((256, 256)) of an RGB picture (bilinear), no crop."""
    return np.asarray(image.resize((SIDE, SIDE), resample=Image.Resampling.BILINEAR), dtype=np.uint8)


class WatermarkDetector:
    """`watermark_score` of pictures."""

    def __init__(self, net: nn.Module, *, device: str, batch_size: int) -> None:
        self._net = net.to(device).eval()
        self._device = device
        self._batch_size = batch_size
        self._mean = torch.tensor(IMAGENET_MEAN, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=device).view(1, 3, 1, 1)

    @classmethod
    def from_file(cls, path: Path | str, *, device: str = "cpu", batch_size: int = 16) -> "WatermarkDetector":
        """Read `watermark_model_v1.pt` in either layout.

        Raises WeightsError when the file is missing, damaged, holds more than tensors, or is another model.
        """
        net = build_net()
        try:
            net.load_state_dict(_state(path))
        except RuntimeError as cause:
            raise WeightsError(f"{path} is not LAION's watermark detector: {str(cause)[:300]}") from cause
        return cls(net, device=device, batch_size=batch_size)

    def __call__(self, images: Sequence[Uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """`watermark_score` float32 [N] in 0..1 (1: watermark) of uint8 RGB pictures [h, w, 3]."""
        return self.score([stretch(Image.fromarray(as_rgb(image))) for image in images])

    def score(self, stretched: Sequence[Uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """The column of pictures that `stretch` made; a score that is not finite is NaN, no value."""
        if not stretched:
            return {"watermark_score": np.zeros(0, dtype=np.float32)}
        return {"watermark_score": in_parts(stretched, self._batch_size, self._forward)}

    def _forward(self, part: Sequence[Uint8]) -> Tensor:
        batch = moved(torch.from_numpy(np.stack(part)), torch.device(self._device))
        with torch.inference_mode(), mixed(self._device):
            return torch.softmax(self._net(self._normalised(batch)).float(), dim=1)[:, WATERMARK]

    def _normalised(self, batch: Tensor) -> Tensor:
        """uint8 [N, 256, 256, 3] to float32 [N, 3, 256, 256], as ToTensor and Normalize do."""
        return (batch.permute(0, 3, 1, 2).to(torch.float32) / 255.0 - self._mean) / self._std


def _state(path: Path | str) -> Mapping[str, Tensor]:
    """The state_dict of either layout. Raises WeightsError."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as cause:
        raise WeightsError(f"no file at {path}; run `curate weights pull`") from cause
    except Exception as cause:  # torch raises pickle, zip, runtime and key errors of many classes here
        raise WeightsError(f"{path} is not a torch file that holds only tensors: {cause}") from cause
    state = loaded.get("weights", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no state_dict")
    return state

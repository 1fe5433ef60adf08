"""LAION's aesthetic heads (`aesthetic_score_laion_v2`, `_v1`) on CLIP image features.

v2 (christophschuhmann/improved-aesthetic-predictor, Apache-2.0): five dense layers on ViT-L/14, without activations
(`*-linearMSE.pth`) or with ReLU after each hidden layer (`*-reluMSE.pth`); scores of about 1 to 10.
v1 (LAION-AI/aesthetic-predictor, MIT): one dense layer on ViT-L/14, B/32 or B/16. Which it is follows from the
file's keys. Files are loaded with `weights_only=True`: no pickled code runs. Dropout is of training and left out.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from curate.errors import WeightsError

Float32 = npt.NDArray[np.float32]

LAYER_KEY = re.compile(r"layers\.(\d+)\.weight")
LINEAR_V2 = (0, 2, 4, 6, 7)  # places of the dense layers among dropouts (simple_inference.py:46-61)
RELU_V2 = (0, 3, 6, 9, 11)  # ... among dropouts and ReLUs


class AestheticHead:
    """Aesthetic score of CLIP image features; v2 or v1."""

    def __init__(self, layers: Sequence[tuple[Float32, Float32]], *, relu: bool) -> None:
        """`layers`: (weight float32 [in, out], bias float32 [out]); `relu`: after each but the last."""
        self._layers = layers
        self._relu = relu

    @property
    def width(self) -> int:
        """Length d of a feature: 768 for ViT-L/14, 512 for ViT-B/32 and B/16."""
        return int(self._layers[0][0].shape[0])

    @classmethod
    def from_file(cls, path: Path | str) -> "AestheticHead":
        """Read a published `.pth` of v2 or v1.

        Raises WeightsError when the file is missing, damaged, holds more than tensors, or is another model.
        """
        state = _state(path)
        if set(state) == {"weight", "bias"}:
            places: tuple[int, ...] = (0,)
            names = [""]
        else:
            places = tuple(sorted(int(match[1]) for key in state if (match := LAYER_KEY.fullmatch(key))))
            names = [f"layers.{place}." for place in places]
        known = set(state) == {name + kind for name in names for kind in ("weight", "bias")}
        if not known or places not in ((0,), LINEAR_V2, RELU_V2):
            raise WeightsError(f"{path} is not a LAION aesthetic head: it has the keys {sorted(state)}")
        layers = [(_numbers(state[f"{name}weight"]).T, _numbers(state[f"{name}bias"])) for name in names]
        widths = [layers[0][0].shape[0], *(weight.shape[1] for weight, _ in layers)]
        if [weight.shape[0] for weight, _ in layers] != widths[:-1] or widths[-1] != 1:
            raise WeightsError(f"{path} is not a LAION aesthetic head: its layers do not fit one another ({widths})")
        return cls(layers, relu=places == RELU_V2)

    def __call__(self, features: Float32) -> Float32:
        """Scores float32 [N] of L2-normalised CLIP image features float32 [N, d].

        A row that is not finite gives NaN, which the scorer makes null. Raises ValueError for another width.
        """
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"expected features [N, {self.width}], got {list(features.shape)}")
        known = np.asarray(np.isfinite(features).all(axis=1))
        hidden = np.where(known[:, None], features, 0.0).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # absurdly large features end as no value
            for weight, bias in self._layers[:-1]:
                hidden = hidden @ weight + bias
                if self._relu:
                    hidden = np.maximum(hidden, 0.0)
            weight, bias = self._layers[-1]
            score = (hidden @ weight + bias)[:, 0]
        return np.where(known & np.isfinite(score), score, np.nan).astype(np.float32)


def _state(path: Path | str) -> Mapping[str, torch.Tensor]:
    """A state_dict of tensors. Raises WeightsError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as cause:
        raise WeightsError(f"no file at {path}; run `curate weights pull`") from cause
    except Exception as cause:  # torch raises pickle, zip, runtime and key errors of many classes here
        raise WeightsError(f"{path} is not a torch file that holds only tensors: {cause}") from cause
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no state_dict")
    return state


def _numbers(tensor: torch.Tensor) -> Float32:
    return np.asarray(tensor.detach().to(torch.float32).numpy(), dtype=np.float32)

"""LAION's CLIP-based NSFW detector (`punsafe`), from the published SavedModel zip, with its vocabulary look-up.

The published heads (LAION-AI/CLIP-based-NSFW-Detector, MIT; OpenAI ViT-L/14 and ViT-B/32) begin with AutoKeras'
MultiCategoryEncoding, which took a few feature columns for categories: their values, printed with six decimals, are
looked up in a vocabulary of float16 numbers. Ports that drop the look-up are wrong by up to 0.4. Equal to
TensorFlow 2.15 within 1e-5 (measured 1e-6). Refuses to threshold, and to guess a value for a row that is not finite.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from curate.errors import WeightsError
from curate.score.saved_model import SavedModel, read_saved_model

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

COLUMN_KEY = re.compile(r"layer_with_weights-0/encoding_layers/(\d+)/token_counts/\.ATTRIBUTES/table-keys")
SIX_DECIMALS = re.compile(rb"(-?)(\d+)\.(\d{6})")
LEAST_DEVIATION = np.float32(1e-7)  # keras.backend.epsilon(), as Normalization uses it
MINUS_ZERO = np.iinfo(np.int64).min  # "-0.000000" is another word than "0.000000"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Codes of one categorical column: `words` int64 [n] sorted, value x 1e6; `codes` float32 [n]; unknown is 0."""

    column: int
    words: Int64
    codes: Float32

    def encode(self, values: Float32) -> Float32:
        """Codes of float32 values [N], as TensorFlow prints and looks them up.

        A float32 times 1e6 is exact in float64 (24 + 20 bits), so rint is exactly what "%f" prints.
        """
        words = np.rint(np.clip(values.astype(np.float64), -1e12, 1e12) * 1e6).astype(np.int64)
        words[(words == 0) & np.signbit(values)] = MINUS_ZERO
        at = np.minimum(np.searchsorted(self.words, words), len(self.words) - 1)
        return np.where(self.words[at] == words, self.codes[at], np.float32(0.0)).astype(np.float32)


class LaionNsfwHead:
    """P(NSFW) of CLIP image features."""

    def __init__(
        self,
        vocabularies: Sequence[Vocabulary],
        mean: Float32,
        deviation: Float32,
        layers: Sequence[tuple[Float32, Float32]],
    ) -> None:
        """`mean`, `deviation` float32 [d]; `layers`: (kernel float32 [in, out], bias float32 [out]), ReLU between."""
        self._vocabularies = vocabularies
        self._mean = mean
        self._deviation = deviation
        self._layers = layers

    @property
    def width(self) -> int:
        """Length d of a feature: 768 for ViT-L/14, 512 for ViT-B/32."""
        return len(self._mean)

    @classmethod
    def from_zip(cls, path: Path | str) -> "LaionNsfwHead":
        """Read `clip_autokeras_binary_nsfw.zip` (L/14) or `clip_autokeras_nsfw_b32.zip` (B/32); no TensorFlow.

        Raises WeightsError when the file is missing, damaged, or another model.
        """
        model = read_saved_model(path)
        try:
            vocabularies = _vocabularies(model)
            mean = _variable(model, "layer_with_weights-1/mean").reshape(-1)
            variance = _variable(model, "layer_with_weights-1/variance").reshape(-1)
            layers = _layers(model)
        except KeyError as cause:
            raise WeightsError(f"{path} is a SavedModel, but not LAION's NSFW head: it has no {cause}") from cause
        widths = [len(mean), *(kernel.shape[1] for kernel, _ in layers)]
        inputs = [kernel.shape[0] for kernel, _ in layers]
        fits = len(variance) == len(mean) and all(word.column < len(mean) for word in vocabularies)
        if not layers or inputs != widths[:-1] or widths[-1] != 1 or not fits:
            raise WeightsError(f"{path} is not LAION's NSFW head: its layers do not fit one another ({widths})")
        return cls(vocabularies, mean, np.maximum(np.sqrt(variance), LEAST_DEVIATION), layers)

    def __call__(self, features: Float32) -> Float32:
        """P(NSFW) float32 [N] in 0..1 of features float32 [N, d].

        Features are L2-normalised and rounded to float16 first, as the published pipeline's were; without the
        rounding the vocabularies are never hit. A row that is not finite gives NaN, which the scorer makes null.
        Raises ValueError for another width.
        """
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"expected features [N, {self.width}], got {list(features.shape)}")
        hidden = np.array(features, dtype=np.float32)  # a copy: the columns below are overwritten
        known = np.isfinite(hidden).all(axis=1)
        hidden[~known] = 0.0
        for vocabulary in self._vocabularies:
            hidden[:, vocabulary.column] = vocabulary.encode(hidden[:, vocabulary.column])
        hidden = (hidden - self._mean) / self._deviation
        kernel, bias = self._layers[-1]
        with np.errstate(over="ignore", invalid="ignore"):  # absurdly large features end as NaN, which is no value
            for inner_kernel, inner_bias in self._layers[:-1]:
                hidden = np.maximum(hidden @ inner_kernel + inner_bias, 0.0)
            logit = (hidden @ kernel + bias)[:, 0]
            tail = np.exp(-np.abs(logit))  # 1 / (1 + e^-x) without overflow on either side
            probability = np.where(logit >= 0, 1.0, tail) / (1.0 + tail)
        return np.where(known, probability, np.nan).astype(np.float32)


def _variable(model: SavedModel, name: str) -> Float32:
    """A float32 variable of the checkpoint. Raises KeyError with its name."""
    found = model.variables[f"{name}/.ATTRIBUTES/VARIABLE_VALUE"]
    if found.dtype != np.float32:
        raise KeyError(f"float32 {name}")
    return found.astype(np.float32)


def _layers(model: SavedModel) -> list[tuple[Float32, Float32]]:
    """Dense layers in order: layer_with_weights-{2, 3, ...}."""
    layers: list[tuple[Float32, Float32]] = []
    while f"layer_with_weights-{len(layers) + 2}/kernel/.ATTRIBUTES/VARIABLE_VALUE" in model.variables:
        name = f"layer_with_weights-{len(layers) + 2}"
        layers.append((_variable(model, f"{name}/kernel"), _variable(model, f"{name}/bias")))
    return layers


def _vocabularies(model: SavedModel) -> list[Vocabulary]:
    """Pair the categorical columns (keys of the checkpoint, ascending) with the graph's (words, codes) constants."""
    columns = sorted(int(match[1]) for key in model.keys if (match := COLUMN_KEY.fullmatch(key)))
    tables = []
    for words, codes in zip(model.consts, model.consts[1:], strict=False):
        if isinstance(words, list) and not isinstance(codes, list) and codes.shape == (len(words),):
            tables.append((words, codes))
    if len(tables) != len(columns):
        raise KeyError(f"{len(columns)} vocabularies for the categorical columns {columns} (found {len(tables)})")
    return [_vocabulary(column, *table) for column, table in zip(columns, tables, strict=True)]


def _vocabulary(column: int, words: Sequence[bytes], codes: npt.NDArray[np.number]) -> Vocabulary:
    """Sort one vocabulary by value; words that no finite number prints as ("nan") are never hit and are left out."""
    pairs = []
    for word, code in zip(words, codes.tolist(), strict=True):
        if match := SIX_DECIMALS.fullmatch(word):
            value = int(match[2]) * 1_000_000 + int(match[3])
            pairs.append((MINUS_ZERO if match[1] and not value else -value if match[1] else value, code))
    if not pairs:
        raise KeyError(f"words in the vocabulary of column {column}")
    pairs.sort()
    values, ordered = zip(*pairs, strict=True)
    return Vocabulary(column, np.array(values, dtype=np.int64), np.array(ordered, dtype=np.float32))

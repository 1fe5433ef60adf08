"""Image classifiers as ONNX files: `p_<label>` for any of them, and `nsfw_score_gantman`.

GantMan's nsfw_model (MIT; MobileNetV2 224, and nsfwjs, its TF.js form) takes pixels / 255 as [N, h, w, 3] and answers
drawings, hentai, neutral, porn, sexy. Pictures are stretched as nsfwjs does it (src/core.ts: bilinear between four
pixels, the corners meeting; no smoothing), whose weights these are; nsfw_model's predict.py takes the nearest pixel
instead, which scatters about the same score. How COYO made one number of the five is not published. Here it is
porn + hentai: the two classes of explicit content; `sexy` (swimwear, underwear) is not in it, since a threshold of
0.5 (COYO's) would then drop most beach photographs. All five classes stay available as columns of their own.
Refuses to softmax, rename or threshold: the file's own outputs are the columns.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from curate.errors import WeightsError
from curate.score.canvas import Float32, Uint8, as_rgb
from curate.score.onnx_session import CPU, open_session

GANTMAN_LABELS = ("drawings", "hentai", "neutral", "porn", "sexy")
GANTMAN_UNSAFE = ("hentai", "porn")

Resize = Literal["bilinear", "corners"]  # pixel centres scaled (Keras, OpenCV), or corners on corners (nsfwjs)


class OnnxClassifier:
    """An ONNX image classifier with one picture input, [N, h, w, 3] or [N, 3, h, w], and one row of outputs a picture.

    The picture is stretched to h x w, scaled to 0..1, then (x - mean) / std.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        labels: Sequence[str],
        *,
        output: str,
        side: tuple[int, int],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        resize: Resize,
        batch_size: int,
    ) -> None:
        self.labels = tuple(labels)
        self._session = session
        self._output = output
        self._input = session.get_inputs()[0].name
        self._channels_last = session.get_inputs()[0].shape[-1] == 3
        self._height, self._width = side
        self._mean = np.array(mean, dtype=np.float32)
        self._std = np.array(std, dtype=np.float32)
        self._resize = _on_corners if resize == "corners" else _on_centres
        self._batch_size = batch_size

    @classmethod
    def from_file(
        cls,
        path: Path | str,
        labels: Sequence[str],
        *,
        output: str | None = None,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
        resize: Resize = "bilinear",
        batch_size: int = 16,
        threads: int = 1,
        providers: Sequence[str] = CPU,
    ) -> "OnnxClassifier":
        """Open a classifier; `output` names one of several outputs (default: the first).

        Raises WeightsError when the file is missing, has no fixed picture size, or does not answer len(labels) numbers.
        """
        session = open_session(path, threads=threads, providers=providers)
        shape = session.get_inputs()[0].shape
        sides = shape[1:3] if len(shape) == 4 and shape[-1] == 3 else shape[2:4]
        if len(shape) != 4 or 3 not in (shape[1], shape[3]) or not all(isinstance(side, int) for side in sides):
            raise WeightsError(f"{path} takes {shape}, expected pictures of a fixed size, [N, h, w, 3] or [N, 3, h, w]")
        outputs = {one.name: one.shape for one in session.get_outputs()}
        name = output or next(iter(outputs))
        if name not in outputs or outputs[name][-1] != len(labels):
            raise WeightsError(
                f"{path} has the outputs {outputs}; expected {name} with {len(labels)} numbers a picture"
            )
        batch = shape[0] if isinstance(shape[0], int) else batch_size
        return cls(
            session,
            labels,
            output=name,
            side=(sides[0], sides[1]),
            mean=mean,
            std=std,
            resize=resize,
            batch_size=batch,
        )

    def __call__(self, images: Sequence[Uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """`p_<label>` float32 [N] each, of uint8 RGB pictures [h, w, 3]; what is not finite is NaN, no value."""
        scores = self.answers([self.prepare(image) for image in images])
        return {f"p_{label}": scores[:, i] for i, label in enumerate(self.labels)}

    def answers(self, prepared: Sequence[Float32]) -> Float32:
        """The model's output float32 [N, labels] for pictures that `prepare` made."""
        starts = range(0, len(prepared), self._batch_size)
        rows = [self._run(np.stack(prepared[start : start + self._batch_size])) for start in starts]
        return np.concatenate([np.zeros((0, len(self.labels)), dtype=np.float32), *rows])

    def prepare(self, image: Uint8) -> Float32:
        """One picture as the model takes it, float32 [h, w, 3] or [3, h, w]."""
        small = self._resize(as_rgb(image), self._height, self._width)
        pixels = (small / np.float32(255) - self._mean) / self._std
        return np.asarray(pixels if self._channels_last else pixels.transpose(2, 0, 1), dtype=np.float32)

    def _run(self, batch: Float32) -> Float32:
        """The output of prepared pictures; a model of a fixed batch gets its last batch filled up."""
        count = len(batch)
        fixed = self._session.get_inputs()[0].shape[0]
        if isinstance(fixed, int) and count < fixed:
            batch = np.concatenate([batch, np.zeros((fixed - count, *batch.shape[1:]), dtype=np.float32)])
        out = self._session.run([self._output], {self._input: np.ascontiguousarray(batch)})[0]
        scores = np.asarray(out, dtype=np.float32).reshape(len(batch), -1)[:count]
        return np.where(np.isfinite(scores), scores, np.float32(np.nan))


class GantmanNsfw:
    """`nsfw_score_gantman` by a GantMan-family model (`drawings, hentai, neutral, porn, sexy`)."""

    def __init__(self, classifier: OnnxClassifier) -> None:
        self._classifier = classifier

    @classmethod
    def from_file(cls, path: Path | str, *, threads: int = 1, providers: Sequence[str] = CPU) -> "GantmanNsfw":
        """Open an ONNX conversion of nsfw_model or nsfwjs. Raises WeightsError."""
        classifier = OnnxClassifier.from_file(
            path, GANTMAN_LABELS, resize="corners", threads=threads, providers=providers
        )
        return cls(classifier)

    def __call__(self, images: Sequence[Uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """`nsfw_score_gantman` float32 [N] = P(porn) + P(hentai), and the five `nsfw_gantman_<class>`."""
        return self.score([self.prepare(image) for image in images])

    def prepare(self, image: Uint8) -> Float32:
        """One picture, stretched: float32 [224, 224, 3]."""
        return self._classifier.prepare(image)

    def score(self, prepared: Sequence[Float32]) -> dict[str, npt.NDArray[np.float32]]:
        """The same columns of pictures that `prepare` made."""
        classes = self._classifier.answers(prepared)
        unsafe = sum(classes[:, GANTMAN_LABELS.index(label)] for label in GANTMAN_UNSAFE)
        named = {f"nsfw_gantman_{label}": classes[:, place] for place, label in enumerate(GANTMAN_LABELS)}
        return {"nsfw_score_gantman": np.clip(unsafe, 0.0, 1.0), **named}


def _on_centres(image: Uint8, height: int, width: int) -> Float32:
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.float32)


def _on_corners(image: Uint8, height: int, width: int) -> Float32:
    """float32 [height, width, 3]: tf.image.resizeBilinear with alignCorners."""
    (above, below, down), (left, right, across) = _between(image.shape[0], height), _between(image.shape[1], width)
    down, across = down[:, None, None], across[:, None]
    upper = image[above[:, None], left] * (1 - across) + image[above[:, None], right] * across
    lower = image[below[:, None], left] * (1 - across) + image[below[:, None], right] * across
    return np.asarray(upper * (1 - down) + lower * down, dtype=np.float32)


def _between(size: int, wanted: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Float32]:
    """For each of `wanted` places from the first pixel to the last: the pixels about it, and how far along it lies."""
    places = np.linspace(0, size - 1, wanted)
    first = places.astype(np.int64)
    return first, np.minimum(first + 1, size - 1), (places - first).astype(np.float32)

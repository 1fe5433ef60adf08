"""Faces: `num_faces` and `face_boxes`, by YuNet (default) or SCRFD, both run by ONNX Runtime.

YuNet (Wu et al. 2023, libfacedetection.train; OpenCV's FaceDetectorYN decodes the same way) is run directly, since
FaceDetectorYN takes only the fixed-size files. SCRFD (Guo et al. 2021, insightface) is what COYO and DataComp used; its
pictures are brought to the canvas as insightface does, small ones enlarged (YuNet was seen to find false faces so).
Boxes are relative [x0, y0, x1, y1] in [0, 1], most certain first, as in DataComp's `face_bboxes`. No landmarks, no
identity, no blurring here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from curate.errors import WeightsError
from curate.score.canvas import Float32, Uint8, as_rgb, blob, fit
from curate.score.onnx_session import CPU, open_session

STRIDES = (8, 16, 32)

# Shipped YuNet n on ../shared/realdata, exact counts: 640 px 0.97-0.985 for thresholds 0.70-0.85 and 0.89 at
# OpenCV's default 0.9; 320 px loses small faces (0.94), and 1280 px costs 2.6 times as much for no gain.
YUNET_SIDE = 640
YUNET_SCORE = 0.8
YUNET_IOU = 0.3  # FaceDetectorYN's nms_threshold

SCRFD_SIDE = 640
SCRFD_SCORE = 0.5  # insightface's det_thresh
SCRFD_IOU = 0.4  # insightface's nms_thresh
SCRFD_ANCHORS = 2  # per cell, in the published 500M to 34G models


@dataclass(frozen=True, slots=True)
class Faces:
    """Faces of one picture: `boxes` float32 [k, 4] relative (x0, y0, x1, y1), `scores` float32 [k], falling."""

    boxes: Float32
    scores: Float32


def columns(found: Sequence[Faces]) -> dict[str, npt.NDArray[np.int32] | list[list[list[float]]]]:
    """`num_faces` int32 [N] and `face_boxes` (per row a list of relative [x0, y0, x1, y1])."""
    return {
        "num_faces": np.array([len(faces.boxes) for faces in found], dtype=np.int32),
        "face_boxes": [faces.boxes.tolist() for faces in found],
    }


class YuNetFaces:
    """YuNet over uint8 RGB pictures of any size; one row of columns a picture."""

    def __init__(self, session: ort.InferenceSession, *, side: int, score: float, batch_size: int) -> None:
        self._session = session
        self.side = side  # of the canvas, in pixels
        self._score = score
        self._batch_size = batch_size
        self._input = session.get_inputs()[0].name
        self._outputs = [f"{kind}_{stride}" for kind in ("cls", "obj", "bbox") for stride in STRIDES]

    @classmethod
    def from_file(
        cls,
        path: Path | str,
        *,
        side: int = YUNET_SIDE,
        score: float = YUNET_SCORE,
        batch_size: int = 8,
        threads: int = 1,
        providers: Sequence[str] = CPU,
    ) -> "YuNetFaces":
        """Open a published YuNet file; a fixed-size file fixes `side` and `batch_size` itself.

        `side`: canvas in pixels, a multiple of 32; `score`: least sqrt(class x objectness) of a face.
        Raises WeightsError when the file is missing or is not YuNet.
        """
        session = open_session(path, threads=threads, providers=providers)
        names = {output.name for output in session.get_outputs()}
        if not {f"{kind}_{stride}" for kind in ("cls", "obj", "bbox") for stride in STRIDES} <= names:
            raise WeightsError(f"{path} is not YuNet: its outputs are {sorted(names)}")
        batch, _, height, _ = session.get_inputs()[0].shape
        return cls(
            session,
            side=height if isinstance(height, int) else side,
            score=score,
            batch_size=batch if isinstance(batch, int) else batch_size,
        )

    def __call__(self, images: Sequence[Uint8]) -> dict[str, npt.NDArray[np.int32] | list[list[list[float]]]]:
        """`num_faces` and `face_boxes` of uint8 RGB pictures [h, w, 3] of any sizes."""
        return columns(self.detect(images))

    def detect(self, images: Sequence[Uint8]) -> list[Faces]:
        """Faces of each picture, with their scores."""
        found: list[Faces] = []
        for start in range(0, len(images), self._batch_size):
            pictures = [self.fitted(image) for image in images[start : start + self._batch_size]]
            pixels = blob(pictures, self.side, fill=0, mean=0.0, scale=1.0, bgr=True)
            outputs = self._session.run(self._outputs, {self._input: pixels})
            found += [
                self._decode([output[row] for output in outputs], picture) for row, picture in enumerate(pictures)
            ]
        return found

    def fitted(self, image: Uint8) -> Uint8:
        """The picture as it lies on the canvas; fitted once more, it stays as it is."""
        return fit(image, self.side)

    def _decode(self, outputs: Sequence[Float32], picture: Uint8) -> Faces:
        """Anchor-free decoding of one picture: centre = cell + offset, size = exp(log size), all times the stride."""
        boxes, scores = [], []
        for level, stride in enumerate(STRIDES):
            classes, objects, offsets = outputs[level][:, 0], outputs[3 + level][:, 0], outputs[6 + level]
            score = np.sqrt(np.clip(classes, 0.0, 1.0) * np.clip(objects, 0.0, 1.0))
            cells = np.flatnonzero(score >= self._score)
            row, column = np.divmod(cells, self.side // stride)
            centre = (np.stack([column, row], axis=1) + offsets[cells, :2]) * stride
            half = np.exp(np.minimum(offsets[cells, 2:], 16.0)) * (stride / 2)
            boxes.append(np.concatenate([centre - half, centre + half], axis=1))
            scores.append(score[cells])
        return _suppressed(np.concatenate(boxes), np.concatenate(scores), picture, YUNET_IOU)


class ScrfdFaces:
    """SCRFD (insightface ONNX, with or without landmarks) over uint8 RGB pictures of any size."""

    def __init__(self, session: ort.InferenceSession, *, side: int, score: float) -> None:
        self._session = session
        self.side = side  # of the canvas, in pixels
        self._score = score
        self._input = session.get_inputs()[0].name

    @classmethod
    def from_file(
        cls,
        path: Path | str,
        *,
        side: int = SCRFD_SIDE,
        score: float = SCRFD_SCORE,
        threads: int = 1,
        providers: Sequence[str] = CPU,
    ) -> "ScrfdFaces":
        """Open a published SCRFD file with three strides (6 outputs, or 9 with landmarks).

        Raises WeightsError when the file is missing or has other outputs.
        """
        session = open_session(path, threads=threads, providers=providers)
        if len(session.get_outputs()) not in (6, 9):
            raise WeightsError(f"{path} is not SCRFD with strides 8, 16, 32: {len(session.get_outputs())} outputs")
        height = session.get_inputs()[0].shape[2]
        return cls(session, side=height if isinstance(height, int) else side, score=score)

    def __call__(self, images: Sequence[Uint8]) -> dict[str, npt.NDArray[np.int32] | list[list[list[float]]]]:
        """`num_faces` and `face_boxes` of uint8 RGB pictures [h, w, 3] of any sizes."""
        return columns(self.detect(images))

    def detect(self, images: Sequence[Uint8]) -> list[Faces]:
        """Faces of each picture, with their scores; one picture a run, as the published files are exported."""
        return [self._detect_one(self.fitted(image)) for image in images]

    def fitted(self, image: Uint8) -> Uint8:
        """The picture as it lies on the canvas, its longer side filling it; fitted once more, it stays as it is."""
        rgb = as_rgb(image)
        height, width = rgb.shape[:2]
        if max(height, width) == self.side:
            return rgb
        ratio, side = height / width, self.side
        size = (max(1, int(side / ratio)), side) if ratio > 1 else (side, max(1, int(side * ratio)))
        return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)

    def _detect_one(self, picture: Uint8) -> Faces:
        """Score, then distances (left, top, right, bottom) from each cell's corner, in strides."""
        pixels = blob([picture], self.side, fill=0, mean=127.5, scale=1 / 128, bgr=False)
        outputs = self._session.run(None, {self._input: pixels})
        boxes, scores = [], []
        for level, stride in enumerate(STRIDES):
            score = outputs[level].reshape(-1)
            keep = np.flatnonzero(score >= self._score)
            row, column = np.divmod(keep // SCRFD_ANCHORS, self.side // stride)
            cell = np.stack([column, row], axis=1).astype(np.float32) * stride
            distance = outputs[3 + level].reshape(-1, 4)[keep] * stride
            boxes.append(np.concatenate([cell - distance[:, :2], cell + distance[:, 2:]], axis=1))
            scores.append(score[keep])
        return _suppressed(np.concatenate(boxes), np.concatenate(scores), picture, SCRFD_IOU)


def _suppressed(boxes: Float32, scores: Float32, picture: Uint8, iou: float) -> Faces:
    """Non-maximum suppression, then canvas pixels to shares of the picture; ties keep the cells' order."""
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    boxes, scores = boxes[finite], scores[finite]
    corners_and_sizes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    kept = cv2.dnn.NMSBoxes(corners_and_sizes.tolist(), scores.tolist(), 0.0, iou) if len(boxes) else []
    order = np.asarray(kept, dtype=np.int64).reshape(-1)
    height, width = picture.shape[:2]
    relative = boxes[order] / np.array([width, height, width, height], dtype=np.float32)
    return Faces(np.clip(relative, 0.0, 1.0).astype(np.float32), scores[order].astype(np.float32))

"""Faces: YuNet against OpenCV's own decoder and against counted faces; SCRFD on a model made here."""

import csv
import os
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
import pytest

from curate.errors import WeightsError
from curate.score.faces import ScrfdFaces, YuNetFaces
from tests.score.onnx_bytes import node, write_onnx

SHARED = os.environ.get("CURATE_SHARED")
needs_shared = pytest.mark.skipif(SHARED is None, reason="needs YuNet and real images: set CURATE_SHARED")


def yunet(name: str, **options: float) -> YuNetFaces:
    return YuNetFaces.from_file(Path(SHARED or "") / "reference/yunet" / f"onnx__yunet_{name}.onnx", **options)


def counted(limit: int) -> list[tuple[np.ndarray, int]]:
    """(RGB picture, faces counted by eye) of the first labelled images."""
    folder = Path(SHARED or "") / "realdata"
    with (folder / "faces.csv").open() as file:
        rows = list(csv.DictReader(file))[:limit]
    return [
        (cv2.cvtColor(cv2.imread(str(folder / row["path"])), cv2.COLOR_BGR2RGB), int(row["num_faces"])) for row in rows
    ]


@needs_shared
def test_equals_opencv() -> None:
    """Decoding is ours; OpenCV's FaceDetectorYN on the same canvas must find the same boxes and scores."""
    path = Path(SHARED or "") / "reference/yunet/onnx__yunet_n_640_640.onnx"
    theirs = cv2.FaceDetectorYN.create(str(path), "", (640, 640), 0.8, 0.3, 5000)
    ours = yunet("n_640_640")
    compared = 0
    for picture, _ in counted(20):
        small = picture[:640, :640]  # no resizing: the comparison is of the decoding
        canvas = np.zeros((640, 640, 3), dtype=np.uint8)
        canvas[: small.shape[0], : small.shape[1]] = small[:, :, ::-1]
        found = theirs.detect(canvas)[1]
        faces = ours.detect([np.ascontiguousarray(small)])[0]
        wanted = np.zeros((0, 15)) if found is None else found[np.argsort(-found[:, 14], kind="stable")]
        size = np.array([small.shape[1], small.shape[0]] * 2)
        boxes = np.concatenate([wanted[:, :2], wanted[:, :2] + wanted[:, 2:4]], axis=1) / size
        np.testing.assert_allclose(faces.boxes, np.clip(boxes, 0, 1), atol=2e-3)
        np.testing.assert_allclose(faces.scores, wanted[:, 14], atol=1e-3)
        compared += len(boxes)
    assert compared > 10


@needs_shared
def test_counts_faces() -> None:
    """The wrong channel order, threshold or canvas shows in the counts first."""
    pictures, wanted = zip(*counted(65), strict=True)
    got = yunet("n_dynamic")(pictures)
    wrong = np.abs(got["num_faces"] - np.array(wanted))
    assert (wrong == 0).mean() >= 0.9
    assert (wrong <= 1).mean() >= 0.96
    assert all(0 <= value <= 1 for boxes in got["face_boxes"] for box in boxes for value in box)


@needs_shared
def test_does_not_depend_on_the_batch() -> None:
    """A resumed shard may batch otherwise; its columns must be the same bits."""
    pictures = [picture for picture, _ in counted(6)]
    together = yunet("n_dynamic", batch_size=6).detect(pictures)
    alone = yunet("n_dynamic", batch_size=1).detect(pictures)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a.boxes, b.boxes)


@needs_shared
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 5000, 3), (5000, 1, 3), (30, 40), (30, 40, 1), (2000, 2000, 3)])
def test_odd_pictures(shape: tuple[int, ...]) -> None:
    """Extreme shapes and greyscale are pictures too: no faces, no exception."""
    got = yunet("n_dynamic")([np.full(shape, 200, dtype=np.uint8)])
    assert got["num_faces"].tolist() == [0]
    assert got["face_boxes"] == [[]]


@needs_shared
def test_nothing_gives_no_rows_and_junk_is_refused() -> None:
    """An empty batch happens when every sample of it failed; a float picture is the caller's mistake."""
    detector = yunet("n_dynamic")
    assert detector([])["num_faces"].shape == (0,)
    with pytest.raises(ValueError, match="uint8"):
        detector([np.zeros((4, 4, 3), dtype=np.float32)])


def write_scrfd(path: Path, side: int = 96) -> Path:
    """SCRFD's nine outputs, three strides of two anchors a cell, as random convolutions of the picture."""
    rng = np.random.default_rng(0)
    nodes, weights, outputs = [], {}, {}
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            name, cells = f"{kind}_{stride}", (side // stride) ** 2
            drawn = rng.normal(0, (4.0 if kind == "score" else 0.8) / np.sqrt(stride), (2 * width, 3, stride, stride))
            weights[f"{name}_w"] = drawn - drawn.mean(axis=(1, 2, 3), keepdims=True)  # the free part says nothing
            weights[f"{name}_b"] = np.full(2 * width, -1.0 if kind == "score" else 2.0)
            nodes.append(node("Conv", ["input.1", f"{name}_w", f"{name}_b"], [f"{name}_c"], strides=[stride, stride]))
            nodes.append(node("Transpose", [f"{name}_c"], [f"{name}_t"], perm=[0, 2, 3, 1]))
            last = f"{name}_a" if kind != "kps" else f"{name}_t"
            if kind != "kps":
                nodes.append(node("Sigmoid" if kind == "score" else "Softplus", [f"{name}_t"], [last]))
            weights[f"{name}_s"] = np.zeros((2 * cells, width))
            nodes += [node("Shape", [f"{name}_s"], [f"{name}_n"]), node("Reshape", [last, f"{name}_n"], [name])]
            outputs[name] = [2 * cells, width]
    return write_onnx(path, nodes, {"input.1": [1, 3, side, side]}, outputs, weights)


def insightface(path: Path, picture: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in the picture's pixels and scores, after insightface's scrfd.py: resize, distances, suppression."""
    ratio = picture.shape[0] / picture.shape[1]
    high, wide = (side, int(side / ratio)) if ratio > 1 else (int(side * ratio), side)
    scale = high / picture.shape[0]
    canvas = np.zeros((side, side, 3), dtype=np.uint8)
    canvas[:high, :wide] = cv2.resize(np.ascontiguousarray(picture[:, :, ::-1]), (wide, high))
    pixels = cv2.dnn.blobFromImage(canvas, 1 / 128, (side, side), (127.5, 127.5, 127.5), swapRB=True)
    answers = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"input.1": pixels})
    found = []
    for level, stride in enumerate((8, 16, 32)):
        scores, distances = answers[level].ravel(), answers[level + 3] * stride
        for place in np.flatnonzero(scores >= 0.5):
            y, x = divmod(place // 2, side // stride)
            left, top, right, bottom = distances[place]
            box = x * stride - left, y * stride - top, x * stride + right, y * stride + bottom
            found.append((float(scores[place]), np.array(box) / scale))
    found.sort(key=lambda item: -item[0])
    kept: list[tuple[float, np.ndarray]] = []
    for score, box in found:
        if all(overlap(box, other) <= 0.4 for _, other in kept):
            kept.append((score, box))
    return np.array([box for _, box in kept]).reshape(-1, 4), np.array([score for score, _ in kept])


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    inner = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return float(inner / max((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner, 1e-9))


@pytest.mark.parametrize("shape", [(96, 96), (200, 130), (60, 87), (40, 31)])
def test_scrfd_is_insightfaces(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Distances in strides from a cell's corner, two anchors a cell, RGB, small pictures enlarged: each shows here."""
    path = write_scrfd(tmp_path / "scrfd.onnx")
    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    picture = cv2.GaussianBlur(picture, (0, 0), 3)
    wanted, scores = insightface(path, picture, 96)
    faces = ScrfdFaces.from_file(path).detect([picture])[0]
    assert len(wanted) > 5
    size = np.array([shape[1], shape[0]] * 2)
    np.testing.assert_allclose(faces.scores, scores, atol=1e-4)
    # int() of the shorter side: up to a pixel of the canvas
    np.testing.assert_allclose(faces.boxes, np.clip(wanted / size, 0, 1), atol=1.5 / min(shape))


def test_another_file_is_refused(tmp_path: Path) -> None:
    """A wrong path or a damaged download is named in the plan."""
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    for name in ("bad.onnx", "none.onnx"):
        with pytest.raises(WeightsError, match=name):
            YuNetFaces.from_file(tmp_path / name)
        with pytest.raises(WeightsError, match=name):
            ScrfdFaces.from_file(tmp_path / name)
    with pytest.raises(WeightsError, match="not YuNet"):
        YuNetFaces.from_file(write_scrfd(tmp_path / "scrfd.onnx"))

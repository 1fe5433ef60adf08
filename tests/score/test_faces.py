"""Faces: YuNet against OpenCV's own decoder and against counted faces; SCRFD on a model made here."""

import csv
import os
from pathlib import Path

import cv2
import numpy as np
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


def write_scrfd(path: Path) -> Path:
    """SCRFD's nine outputs with one certain face at a cell of stride 16, and its twin, whatever the picture."""
    weights, outputs = {}, {}
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            name = f"{kind}_{stride}"
            weights[f"{name}_w"] = np.full((2 * (64 // stride) ** 2, width), float(kind == "bbox"), dtype=np.float32)
            outputs[name] = list(weights[f"{name}_w"].shape)
    first = 2 * (1 * 4 + 2)  # row 1, column 2: both anchors of the cell
    weights["score_16_w"][first : first + 2, 0] = [0.9, 0.8]
    nodes = [node("Identity", [f"{name}_w"], [name]) for name in outputs]
    return write_onnx(path, nodes, {"input.1": [1, 3, 64, 64]}, outputs, weights)


def test_scrfd_decoding(tmp_path: Path) -> None:
    """Distances are in strides from the cell's corner; two anchors share a cell and are one face."""
    detector = ScrfdFaces.from_file(write_scrfd(tmp_path / "scrfd.onnx"))
    faces = detector.detect([np.zeros((64, 64, 3), dtype=np.uint8)])[0]
    np.testing.assert_allclose(faces.boxes, [[16 / 64, 0, 48 / 64, 32 / 64]], atol=1e-6)
    np.testing.assert_allclose(faces.scores, [0.9], atol=1e-6)
    assert detector([np.zeros((64, 32), dtype=np.uint8)])["face_boxes"] == [[[0.5, 0.0, 1.0, 0.5]]]


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

"""Text detection with the model of the rapidocr wheel, on pictures drawn here; bars on real images where they are."""

import csv
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from curate.errors import WeightsError
from curate.score.canvas import blob
from curate.score.onnx_session import open_session
from curate.score.text_density import DETECTOR, TextDetector, TextView, wheel_model
from tests.score.onnx_bytes import node, write_onnx

SHARED = os.environ.get("CURATE_SHARED")


@pytest.fixture(scope="module")
def detector() -> TextDetector:
    return TextDetector.from_file()


def paper(height: int = 480, width: int = 640) -> np.ndarray:
    return np.full((height, width, 3), 245, dtype=np.uint8)


def page(lines: int) -> np.ndarray:
    """A page of text."""
    picture = paper()
    for i in range(lines):
        text = f"line {i} of the annual report, with numbers {i * 37}"
        cv2.putText(picture, text, (20, 30 + i * 26), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (20, 20, 20), 1, cv2.LINE_AA)
    return picture


def sign() -> np.ndarray:
    """One word on a gradient."""
    picture = np.repeat(np.linspace(60, 190, 640, dtype=np.uint8)[None, :, None], 480, axis=0).repeat(3, axis=2)
    cv2.putText(picture, "EXIT", (200, 260), cv2.FONT_HERSHEY_SIMPLEX, 3, (255, 255, 255), 6, cv2.LINE_AA)
    return picture


def test_a_page_is_denser_than_a_sign(detector: TextDetector) -> None:
    """Area alone ranks a big sign above a page; the density must not."""
    got = detector([paper(), sign(), page(16)])
    density, boxes, area = got["text_density"], got["text_boxes"], got["text_area"]
    assert density[0] == 0 and boxes[0] == 0 and area[0] == 0
    assert 0.02 < density[1] < 0.3 < density[2] < 1
    assert boxes[1] == 1 and boxes[2] >= 16
    assert 0.02 < area[1] < 0.5


def test_regions_lie_on_the_text(detector: TextDetector) -> None:
    """A swapped axis or a wrong scale moves the regions; T-MARS would then paint over the wrong pixels."""
    picture = paper(1000, 1600)
    cv2.putText(picture, "HELLO WORLD", (900, 820), cv2.FONT_HERSHEY_SIMPLEX, 3, (0, 0, 0), 8, cv2.LINE_AA)
    ink = (picture[:, :, 0] < 128).astype(np.uint8)
    mask = detector.detect([picture])[0].mask(1000, 1600)
    assert (mask & ink).sum() / ink.sum() > 0.9
    assert mask.mean() < 0.15


def test_small_letters_survive_storing_at_512(detector: TextDetector) -> None:
    """Pools hold pictures of 512 pixels; letters that are then 4 pixels high must still be found (0.974 if not)."""
    large = paper(1280, 1280)
    for place in range(60, 1240, 24):
        cv2.putText(large, "small letters of a long page " * 2, (60, place), 0, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    stored = cv2.resize(large, (512, 512), interpolation=cv2.INTER_AREA)
    whole, small = detector([large])["text_density"][0], detector([stored])["text_density"][0]
    assert whole > 0.85 and small > 0.98 * whole


def test_regions_are_rapidocrs_own(detector: TextDetector) -> None:
    """Guards against another post-processing than PaddleOCR's, on the same probability map."""
    from rapidocr.ch_ppocr_det.utils import DBPostProcess  # its code is published, and not ours

    canvas = TextView(page(8)).pixels
    session = open_session(wheel_model(DETECTOR))
    pixels = blob([canvas], 736, fill=127, mean=127.5, scale=1 / 127.5, bgr=True)
    (answer,) = session.run(None, {session.get_inputs()[0].name: pixels})
    probability = answer[:, :, : canvas.shape[0], : canvas.shape[1]]
    published = DBPostProcess(thresh=0.3, box_thresh=0.4, unclip_ratio=1.6, use_dilation=True)
    boxes, _ = published(probability, canvas.shape[:2])
    ours = detector.detect([canvas])[0].quads * np.array([canvas.shape[1], canvas.shape[0]])
    assert len(ours) == len(boxes) >= 8
    centres = np.asarray(boxes).mean(axis=1)
    for quad in ours:
        near = np.asarray(boxes)[np.abs(centres - quad.mean(axis=0)).sum(axis=1).argmin()]
        assert np.abs(near.min(axis=0) - quad.min(axis=0)).max() <= 2
        assert np.abs(near.max(axis=0) - quad.max(axis=0)).max() <= 2


def test_one_region_over_everything_does_not_count(tmp_path: Path) -> None:
    """A detector that calls every whole picture one region (a coffee cup) must give neither area, boxes nor density."""
    weights = {"w": np.full((1, 3, 1, 1), 1 / 3, dtype=np.float32)}
    sides: list[int | str] = ["n", 3, "h", "w"]
    nodes = [node("Conv", ["x", "w"], ["y"])]  # probability = brightness, in -1..1
    path = write_onnx(tmp_path / "bright.onnx", nodes, {"x": sides}, {"y": ["n", 1, "h", "w"]}, weights)
    white = np.full((300, 400, 3), 255, dtype=np.uint8)
    dot = np.zeros((300, 400, 3), dtype=np.uint8)
    dot[100:115, 50:200] = 255
    got = TextDetector.from_file(path)([white, dot])
    assert got["text_boxes"].tolist() == [0, 1]
    assert got["text_area"][0] == 0
    assert got["text_density"][0] < 0.02 < got["text_density"][1]


def test_does_not_depend_on_the_batch(detector: TextDetector) -> None:
    """A resumed shard may batch otherwise; its columns must be the same bits."""
    pictures = [sign(), page(5), paper(), page(12), sign()[:, :300]]
    together = detector(pictures)
    alone = [TextDetector.from_file(batch_size=1)([picture]) for picture in pictures]
    for column, values in together.items():
        np.testing.assert_array_equal(values, np.concatenate([one[column] for one in alone]))


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 5000, 3), (5000, 1, 3), (30, 40), (30, 40, 1)])
def test_odd_pictures(detector: TextDetector, shape: tuple[int, ...]) -> None:
    """Extreme shapes and greyscale are pictures too; noise must not take forever."""
    got = detector([np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)])
    assert all(len(values) == 1 and np.isfinite(values).all() for values in got.values())
    assert 0 <= got["text_area"][0] <= 1


def test_nothing_gives_no_rows(detector: TextDetector) -> None:
    """An empty batch happens when every sample of it failed."""
    assert {column: len(values) for column, values in detector([]).items()} == {
        "text_area": 0,
        "text_boxes": 0,
        "text_density": 0,
    }


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    """The plan must say which file is missing."""
    with pytest.raises(WeightsError, match="gone"):
        TextDetector.from_file(tmp_path / "gone.onnx")


@pytest.mark.skipif(SHARED is None, reason="needs real images: set CURATE_SHARED")
def test_separates_real_images(detector: TextDetector) -> None:
    """A sample of 8 of each kind; the full figures are printed by benchmarks/bench_quality.py."""
    folder = Path(SHARED or "") / "realdata"
    with (folder / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["folder"].startswith("text_")]
    density = {}
    for kind in ("text_none", "text_light", "text_heavy"):
        paths = [folder / row["path"] for row in rows if row["folder"] == kind]
        pictures = [cv2.imread(str(path)) for path in paths[:: len(paths) // 8]]
        found = [cv2.cvtColor(picture, cv2.COLOR_BGR2RGB) for picture in pictures if picture is not None]
        density[kind] = detector(found)["text_density"]
    text = np.concatenate([density["text_light"], density["text_heavy"]])
    rest = np.concatenate([density["text_light"], density["text_none"]])
    assert (text[:, None] > density["text_none"]).mean() > 0.95
    assert (density["text_heavy"][:, None] > rest).mean() > 0.97

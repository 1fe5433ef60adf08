"""Facts of pixels against their definitions, and what they must tell apart."""

import cv2
import numpy as np
import pytest
from PIL import Image

from curate.score.image_facts import COLUMNS, image_facts


def photo() -> np.ndarray:
    """A picture with structure at every scale."""
    rng = np.random.default_rng(0)
    picture = np.zeros((300, 400, 3), dtype=np.float32)
    for side in (4, 12, 40, 120):
        noise = rng.uniform(-1, 1, (side, side, 3)).astype(np.float32)
        picture += cv2.resize(noise, (400, 300), interpolation=cv2.INTER_CUBIC) * 30
    return np.clip(picture + 128, 0, 255).astype(np.uint8)


def test_definitions() -> None:
    """Each column against the formula in its docstring, written out."""
    picture = photo()
    got = {column: float(values[0]) for column, values in image_facts([picture]).items()}
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float64)
    padded = np.pad(grey, 1, mode="reflect")
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    assert got["sharpness"] == pytest.approx((around - 4 * grey).var(), rel=1e-5)
    counts = np.unique(grey, return_counts=True)[1] / grey.size
    assert got["entropy"] == pytest.approx(-(counts * np.log2(counts)).sum(), rel=1e-5)
    assert got["entropy"] == pytest.approx(Image.fromarray(grey.astype(np.uint8)).entropy(), rel=1e-5)
    assert got["contrast"] == pytest.approx(grey.std() / 255, rel=1e-5)
    near = np.abs(picture - np.median(picture, axis=(0, 1))).max(axis=2) <= 8
    assert got["flat_share"] == pytest.approx(near.mean(), rel=1e-5)
    spread = picture.max(axis=2).astype(float) - picture.min(axis=2)
    assert got["chroma"] == pytest.approx(spread.mean() / 255, rel=1e-5)


def test_blurred_blank_grey_and_placeholder() -> None:
    """The four kinds of picture that the columns are for."""
    sharp = photo()
    blurred = cv2.GaussianBlur(sharp, (0, 0), 3)
    blank = np.full((200, 200, 3), 240, dtype=np.uint8)
    placeholder = blank.copy()
    cv2.putText(placeholder, "?", (80, 120), cv2.FONT_HERSHEY_SIMPLEX, 2, (120, 120, 120), 2)
    grey = np.repeat(sharp[:, :, :1], 3, axis=2)
    got = image_facts([sharp, blurred, blank, placeholder, grey])
    assert got["sharpness"][1] < got["sharpness"][0] / 5
    assert got["sharpness"][2] == got["entropy"][2] == got["contrast"][2] == 0
    assert got["flat_share"][2] == 1 and got["flat_share"][3] > 0.95 and got["flat_share"][0] < 0.5
    assert got["chroma"][4] == 0 < got["chroma"][0]


def test_size_matters_little() -> None:
    """A picture stored larger must not look sharper or flatter."""
    small = cv2.resize(photo(), (512, 384), interpolation=cv2.INTER_CUBIC)
    large = cv2.resize(small, (2048, 1536), interpolation=cv2.INTER_NEAREST)
    got = image_facts([small, large])
    for column in COLUMNS:
        assert got[column][1] == pytest.approx(got[column][0], rel=0.05)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 5000, 3), (30, 20), (30, 20, 1)])
def test_odd_pictures(shape: tuple[int, ...]) -> None:
    """Extreme shapes and greyscale give finite numbers, and an empty batch no rows."""
    got = image_facts([np.full(shape, 7, dtype=np.uint8)])
    assert all(values.dtype == np.float32 and np.isfinite(values).all() for values in got.values())
    assert all(values.shape == (0,) for values in image_facts([]).values())

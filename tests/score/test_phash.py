"""pHash against imagehash itself."""

import io
import os
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image

from curate.score.decode import Picture, decode
from curate.score.phash import PhashScorer, PhashSettings, hash_of, phash
from tests.score.tiny import encoded, picture

SHARED = os.environ.get("CURATE_SHARED")


def test_equal_to_imagehash_on_drawn_flat_and_odd_images() -> None:
    """Guards against bits that flip where coefficients are rounding noise: flat, striped and tiny images."""
    images = [picture(seed, (20 + 13 * (seed % 9), 20 + 11 * (seed % 7))) for seed in range(120)]
    images += [Image.new("RGB", (50, 30), (grey, grey, grey)) for grey in range(0, 256, 15)]
    images += [Image.new("RGB", (1, 1), (9, 200, 3)), Image.new("RGB", (3000, 2), (9, 200, 3))]
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    images += [Image.fromarray(stripes), Image.fromarray(stripes.T.copy())]
    for image in images:
        assert phash(image) == str(imagehash.phash(image))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_equal_in_every_mode(mode: str) -> None:
    """Guards against hashing another grey than imagehash does for palettes, transparency and 16 bits."""
    if mode == "I;16":
        image = Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20)
    else:
        image = picture(3).convert(mode)
    kind = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    found = decode(encoded(image, kind))
    assert isinstance(found, Picture)
    scorer = PhashScorer("phash", PhashSettings())
    opened = Image.open(io.BytesIO(encoded(image, kind)))
    assert scorer.prepare(found, None) == str(imagehash.phash(opened))


def test_batched_transforms_are_not_needed_for_equality() -> None:
    """Guards against the shortcut of the second transform (8 rows of 32) giving other bits on noise."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
        assert hash_of(pixels) == str(imagehash.phash(Image.fromarray(pixels)))


@pytest.mark.skipif(SHARED is None, reason="CURATE_SHARED is not set: no real images here")
def test_equal_on_real_files() -> None:
    """Guards against a difference on files that nobody here made (JPEG, PNG, WebP, GIF of many encoders)."""
    files = sorted(path for path in Path(str(SHARED), "realdata", "images").rglob("*") if path.is_file())
    assert len(files) > 300
    for file in files:
        found = decode(file.read_bytes())
        assert isinstance(found, Picture), file
        with Image.open(file) as image:
            assert phash(found.image) == str(imagehash.phash(image)), file

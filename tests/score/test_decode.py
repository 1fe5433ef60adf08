"""Stored bytes to RGB: what people see is what is scored."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from curate.score.decode import Picture, decode


def _bytes(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(mode: str) -> None:
    """Guards against logos that are black text on black, which no detector reads."""
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((5, 5, 15, 15), fill=(0, 0, 0, 255))
    picture = decode(_bytes(image.convert(mode)))
    assert isinstance(picture, Picture)
    assert picture.image.mode == mode
    assert picture.pixels[0, 0].tolist() == [255, 255, 255]
    assert picture.pixels[10, 10].tolist() == [0, 0, 0]


def test_opaque_pictures_keep_their_pixels() -> None:
    """Guards against compositing that changes what has no alpha."""
    noise = np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)
    picture = decode(_bytes(Image.fromarray(noise)))
    assert isinstance(picture, Picture)
    assert np.array_equal(picture.pixels, noise)

"""Stored bytes to a picture, once for all scorers.

Decodes with Pillow, like open_clip, imagehash and img2dataset, and refuses to guess: a file that Pillow cannot read to
its end is `Unscorable`, not a grey rectangle. EXIF orientation is left alone, as those three leave it.
"""

import io
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

T = TypeVar("T")

Image.init()
# A bomb is a status here, and remarks on palettes and EXIF say nothing of pixels. Set once: threads decode.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Decoders that web images need (JPEG covers MPO), of those that this Pillow was built with; its others (PSD, FITS,
# EPS …) are rarely fuzzed and never wanted here.
FORMATS: list[str] = [
    kind for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM") if kind in Image.OPEN
]
MAX_PIXELS = 178_956_970  # Pillow's own warning mark: 512 MB of RGB; fetch refuses earlier (fetch.max_pixels)


@dataclass(frozen=True)
class Unscorable:
    """Why a sample gives no value: a word for the counters."""

    reason: str


@dataclass(frozen=True)
class Picture:
    """A decoded image. `image` has the file's own mode; `size_bytes` is the length of the stored bytes.

    `rgb` and `pixels` of a picture of 16 bits or floats are what fetch stores of it: Pillow's plain `convert` cuts at
    255 instead, and a photograph of 16 bits becomes a white sheet.
    """

    image: Image.Image
    size_bytes: int
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def rgb(self) -> Image.Image:
        """Mode RGB, transparency over white, as fetch stores it and as pages show it.

        Pillow's plain `convert` drops alpha instead, and black text on nothing becomes black on black.
        """
        if self.image.mode == "RGB":
            return self.image
        if self.image.mode.startswith(("I", "F")):
            return _to_8_bits(self.image).convert("RGB")
        if not self.image.has_transparency_data:
            return self.image.convert("RGB")
        layer = self.image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")

    @cached_property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """uint8 [height, width, 3], RGB."""
        return np.asarray(self.rgb)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once for all scorers that ask by this key: one resize serves two models.

        One thread prepares a picture for every scorer, so there is no lock.
        """
        if key not in self._made:
            self._made[key] = make()
        found: T = self._made[key]
        return found


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Integers of 16 bits, or floats up to 1, 255 or 65,535, as mode L; a row at a time, for memory."""
    values = np.asarray(image)
    brightest = np.fmax.reduce(values, axis=None, initial=0.0) if image.mode == "F" else 65_535.0  # fmax passes NaN
    white = next((white for white in (1.0, 255.0) if brightest <= white), 65_535.0)
    levels = np.empty(values.shape, np.uint8)
    for row, line in enumerate(values):
        levels[row] = (np.nan_to_num(line.astype(np.float64)) * (255.0 / white)).clip(0, 255).round()
    return Image.fromarray(levels)


def decode(data: bytes) -> Picture | Unscorable:
    """Decode to the last pixel. Reasons: `not_image`, `too_many_pixels`, `decode_error`."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        return Unscorable("too_many_pixels")
    except Exception:  # Pillow's plug-ins raise whatever a broken header makes them raise
        return Unscorable("not_image")
    if image.width * image.height > MAX_PIXELS:
        return Unscorable("too_many_pixels")
    try:
        image.load()
    except Exception:  # as above, for broken bodies
        return Unscorable("decode_error")
    return Picture(image, len(data))

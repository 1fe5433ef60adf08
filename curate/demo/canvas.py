"""The canvas, colours, words and fonts that the demo's drawings share, because the demo must run offline.

Pillow draws, and its built-in Aileron is the only font: nothing is downloaded. It refuses to know what is drawn; that
stands in `scenes` and `printed`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, TypeVar, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Kind = Literal["shapes", "scene", "document", "chart", "sign"]
Rgb = tuple[int, int, int]
Point = tuple[float, float]
T = TypeVar("T")

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
SUPERSAMPLING: Final = 2  # ImageDraw has no anti-aliasing; drawing at twice the size and halving costs about 2 ms

COLOURS: Final[dict[str, Rgb]] = {
    "red": (206, 34, 38),
    "orange": (240, 132, 22),
    "yellow": (245, 214, 40),
    "green": (40, 150, 62),
    "blue": (34, 84, 202),
    "purple": (122, 44, 158),
    "pink": (242, 126, 178),
    "brown": (124, 76, 40),
    "black": (26, 26, 28),
    "white": (244, 244, 242),
}


@dataclass(frozen=True)
class Drawing:
    """An RGB image (sides of 208 to 640 pixels), a caption that is true of it, and what it shows."""

    image: Image.Image
    caption: str
    kind: Kind
    subject: str  # the thing shown: "star", "boat", "bar chart"; a caption of another subject is a wrong one


@dataclass(frozen=True)
class Canvas:
    """A supersampled image under the pen; `width` and `height` count its own, supersampled pixels."""

    image: Image.Image
    pen: ImageDraw.ImageDraw
    width: int
    height: int
    rng: np.random.Generator

    @classmethod
    def blank(cls, size: tuple[int, int], colour: Rgb, rng: np.random.Generator) -> "Canvas":
        """A canvas that `finished` will bring to `size` = (width, height) in pixels."""
        large = (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING)
        image = Image.new("RGB", large, colour)
        return cls(image, ImageDraw.Draw(image), *large, rng)

    def uniform(self, low: float, high: float) -> float:
        """One number from [low, high)."""
        return float(self.rng.uniform(low, high))

    def gradient(self, top: Rgb, bottom: Rgb, y0: float = 0.0, y1: float = 1.0) -> None:
        """Fill the band between the relative heights `y0` and `y1` with a vertical gradient."""
        rows = max(1, round((y1 - y0) * self.height))
        column = np.linspace(top, bottom, rows).astype(np.uint8)[:, None, :]
        self.image.paste(Image.fromarray(column).resize((self.width, rows)), (0, round(y0 * self.height)))

    def polygon(self, points: Sequence[Point], colour: Rgb) -> None:
        """Fill the polygon whose corners are relative to the canvas, 0 to 1 from the top left."""
        self.pen.polygon([(x * self.width, y * self.height) for x, y in points], fill=colour)

    def disc(self, x: float, y: float, radius: float, colour: Rgb) -> None:
        """Fill a disc centred at the relative (x, y); `radius` is relative to the shorter side."""
        cx, cy, r = x * self.width, y * self.height, radius * min(self.width, self.height)
        self.pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Rgb) -> None:
        """Fill the rectangle between two relative corners."""
        corners = (x0 * self.width, y0 * self.height, x1 * self.width, y1 * self.height)
        self.pen.rectangle(corners, fill=colour)

    def finished(self, light: float, grain: float) -> Image.Image:
        """The canvas at its final size, under uneven light of strength `light` and noise `grain` (grey levels).

        Flat drawings would share pHashes, whose 64 bits are the signs of the 8 × 8 lowest frequencies, and would
        compress below the 5 kB that web recipes ask for; light and grain give them what photographs have.
        """
        small = self.image.reduce(SUPERSAMPLING)
        field = self.rng.normal(0.0, light, (5, 6)).astype(np.float32)
        smooth = np.asarray(Image.fromarray(field).resize(small.size, Image.Resampling.BICUBIC))
        noise = self.rng.standard_normal((small.height, small.width), dtype=np.float32) * grain
        lit = np.asarray(small, dtype=np.float32) + (smooth + noise)[:, :, None]
        return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, all equally likely."""
    return options[int(rng.integers(len(options)))]


def pick_colours(rng: np.random.Generator, count: int, names: Sequence[str] = tuple(COLOURS)) -> list[str]:
    """`count` different colour names."""
    return [names[i] for i in rng.permutation(len(names))[:count]]


def tint(rng: np.random.Generator, name: str, spread: int = 14) -> Rgb:
    """The named colour, each channel off by at most `spread`, so that no two reds are the same."""
    r, g, b = (int(np.clip(c + rng.integers(-spread, spread + 1), 0, 255)) for c in COLOURS[name])
    return r, g, b


def photo_size(rng: np.random.Generator) -> tuple[int, int]:
    """(width, height) in pixels: long side 320 to 640, ratio 1 to 1.5, either way up."""
    long = int(rng.integers(320, 641))
    short = round(long / float(rng.uniform(1.0, 1.5)))
    return (long, short) if rng.random() < 0.65 else (short, long)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Aileron Regular, which Pillow >= 10.1 carries, at `size` pixels."""
    loaded = ImageFont.load_default(size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise OSError("this Pillow was built without FreeType, so the demo cannot draw text; install a wheel of Pillow")
    return loaded

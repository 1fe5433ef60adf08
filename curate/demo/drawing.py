"""The demo's drawings by kind and seed, and how they become files.

`draw(kind, seed)` gives the same pixels and caption for the same arguments on one machine, and `encoded` the same
bytes. It refuses to be a data set: the drawings exist to test the line and to train the demo's own tiny CLIP.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Literal

import numpy as np
from PIL import Image

from curate.demo.canvas import KINDS, Drawing, Kind, pick
from curate.demo.printed import draw_chart, draw_document, draw_sign
from curate.demo.scenes import draw_scene, draw_shapes

Encoding = Literal["JPEG", "PNG", "WEBP"]

SUFFIXES: Final[dict[Encoding, str]] = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
CONTENT_TYPES: Final[dict[Encoding, str]] = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}

_ARTISTS: Final[dict[Kind, Callable[[np.random.Generator], Drawing]]] = {
    "shapes": draw_shapes,
    "scene": draw_scene,
    "document": draw_document,
    "chart": draw_chart,
    "sign": draw_sign,
}


def draw(kind: Kind, seed: int) -> Drawing:
    """Draw one image of `kind`; the same (kind, seed ≥ 0) gives the same pixels and caption."""
    drawing = _ARTISTS[kind](np.random.default_rng([seed, KINDS.index(kind)]))
    return replace(drawing, caption=re.sub(r"\ba (?=orange|annual)", "an ", drawing.caption))


def wrong_caption(drawing: Drawing, others: Sequence[Drawing], rng: np.random.Generator) -> str:
    """A caption that is true of one of `others` with another subject, and so not of `drawing`.

    Raises:
        ValueError: none of `others` has another subject.
    """
    elsewhere = [other.caption for other in others if other.subject != drawing.subject]
    if not elsewhere:
        raise ValueError(f"no drawing of another subject than {drawing.subject!r} to take a wrong caption from")
    return pick(rng, elsewhere)


def as_alt_text(caption: str, rng: np.random.Generator) -> str:
    """The caption as another page might word it: as it is, or with the usual words of picture pages around it."""
    return pick(rng, ("{}", "{}", "{}, stock image", "wallpaper: {}")).format(caption)


def encoded(image: Image.Image, encoding: Encoding, quality: int = 88) -> bytes:
    """The file's bytes; `quality` (1 to 95) counts for JPEG and WebP, PNG keeps every pixel."""
    buffer = io.BytesIO()
    if encoding == "PNG":
        image.save(buffer, "PNG", compress_level=3)  # level 6 took three times as long for 4 % fewer bytes
    elif encoding == "WEBP":
        image.save(buffer, "WEBP", quality=quality, method=2)
    else:
        image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()

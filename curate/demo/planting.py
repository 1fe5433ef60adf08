"""Plan the pages of the demo's small web: which picture, which caption, and what is wrong with it on purpose.

Everything is decided by the seed, and every page carries its truth, so that the demo can say what it found of what was
planted. It refuses to touch disk or network; `web` writes and `server` serves.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import imagehash
import numpy as np
from PIL import Image

from curate.demo.canvas import Drawing, Kind, pick
from curate.demo.drawing import SUFFIXES, Encoding, as_alt_text, draw, encoded
from curate.demo.printed import watermarked

CopyKind = Literal["exact_copy", "recoded_copy", "resized_copy"]

# What is planted, and how many rows of it: 639 in all.
COUNTS: Final[Mapping[str, int]] = {
    "shapes": 120,
    "scene": 130,
    "document": 36,
    "chart": 30,
    "sign": 30,
    "watermarked": 36,
    "wrong_caption": 60,
    "exact_copy": 36,
    "recoded_copy": 24,
    "resized_copy": 24,
    "tiny": 16,
    "extreme_ratio": 12,
    "http_404": 16,
    "http_500": 6,
    "hang": 2,
    "truncated": 4,
    "redirected": 10,
    "redirect_loop": 3,
    "redirect_private": 3,
    "html": 6,
    "bomb_pixels": 2,
    "bomb_gzip": 1,
    "opted_out": 8,
    "robots": 6,
    "null_url": 3,
    "empty_url": 3,
    "repeated_row": 12,
}
COPY_KINDS: Final[tuple[CopyKind, ...]] = ("exact_copy", "recoded_copy", "resized_copy")

# The statuses (of schema.STATUSES) that are right for a kind under configs/demo.yaml; the rest must be fetched.
EXPECTED: Final[Mapping[str, tuple[str, ...]]] = {
    "tiny": ("too_small",),
    "extreme_ratio": ("bad_ratio",),
    "http_404": ("http_4xx",),
    "http_500": ("http_5xx",),
    "hang": ("timeout", "too_slow"),
    "truncated": ("connect", "decode_error"),
    "redirect_loop": ("bad_url",),
    "redirect_private": ("blocked_address",),
    "html": ("not_image", "decode_error"),
    "bomb_pixels": ("too_many_pixels",),
    "bomb_gzip": ("too_large",),
    "opted_out": ("opted_out",),
    "robots": ("robots",),
    "null_url": ("bad_url",),
    "empty_url": ("bad_url",),
}
FETCHED: Final = ("ok",)

SEEDS_PER_WEB: Final = 10_000
WEBS: Final = 100  # seeds from 1,000,000 on belong to the training and test drawings


@dataclass(frozen=True)
class Page:
    """One row of the table: a path (empty or none for a bad URL), a caption, the picture once there, and its truth."""

    kind: str  # a key of COUNTS
    path: str | None
    text: str
    body: bytes  # the picture's file when the table was made
    encoding: Encoding
    content: Kind
    subject: str
    caption_is_true: bool = True
    is_watermarked: bool = False
    group: str | None = None  # pages of one picture share it
    phash_distance: int | None = None  # to the picture it was copied from, bits of 64


def plan(seed: int) -> list[Page]:
    """All pages of the web with this seed (0 to 99), in table order; the same seed gives the same pages.

    Raises:
        ValueError: the seed is outside 0 to 99, whose drawings the demo's CLIP never saw.
    """
    if not 0 <= seed < WEBS:
        raise ValueError(
            f"the demo's web takes a seed from 0 to {WEBS - 1}, not {seed}; higher drawings were trained on"
        )
    rng = np.random.default_rng([seed, 5])
    fresh = numbered_drawings(seed, rng)
    pages: list[Page] = []
    for kind, count in COUNTS.items():
        fates = 0 if kind in (*COPY_KINDS, "repeated_row") else count
        pages += [planted(kind, *next(fresh[kind_of_drawing(kind, rng)]), rng) for _ in range(fates)]
    pages = with_wrong_captions(pages, rng)
    for kind in COPY_KINDS:
        pages = with_copies(pages, kind, COUNTS[kind], rng)
    pages += [replace(page, kind="repeated_row") for page in pages[: COUNTS["repeated_row"]]]
    return [pages[i] for i in rng.permutation(len(pages))]


def numbered_drawings(seed: int, rng: np.random.Generator) -> Mapping[Kind, Iterator[tuple[int, Drawing]]]:
    """For each kind an endless supply of (number, drawing), no number twice."""
    numbers = iter(range(seed * SEEDS_PER_WEB, (seed + 1) * SEEDS_PER_WEB))

    def supply(kind: Kind) -> Iterator[tuple[int, Drawing]]:
        for number in numbers:
            yield number, draw(kind, number)

    kinds: tuple[Kind, ...] = ("shapes", "scene", "document", "chart", "sign")
    return {kind: supply(kind) for kind in kinds}


def kind_of_drawing(kind: str, rng: np.random.Generator) -> Kind:
    """What a page of `kind` shows: its own kind of drawing, or a shape or scene that then meets a fate."""
    match kind:
        case "shapes" | "scene" | "document" | "chart" | "sign":
            return kind
        case _:
            return "shapes" if rng.random() < 0.4 else "scene"


def planted(kind: str, number: int, drawing: Drawing, rng: np.random.Generator) -> Page:
    """A page of `kind` that shows the numbered drawing."""
    image, encoding = drawing.image, encoding_of(rng)
    if kind == "watermarked":
        image = watermarked(image, number)
    elif kind == "tiny":
        image.thumbnail((int(rng.integers(16, 32)),) * 2)
    elif kind == "extreme_ratio":
        image = image.resize((640, 96)) if rng.random() < 0.7 else image.resize((90, 600))
    folder = "members" if kind == "robots" else "img"
    path: str | None = f"/{folder}/{number:06d}-{drawing.subject.replace(' ', '-')}{SUFFIXES[encoding]}"
    path = {"null_url": None, "empty_url": ""}.get(kind, path)
    body = encoded(image, encoding, int(rng.integers(80, 95)))
    page = Page(kind, path, drawing.caption, body, encoding, drawing.kind, drawing.subject)
    return replace(page, is_watermarked=kind == "watermarked")


def encoding_of(rng: np.random.Generator) -> Encoding:
    """A file format with about the shares of the web."""
    share = rng.random()
    return "JPEG" if share < 0.76 else "PNG" if share < 0.88 else "WEBP"


def with_wrong_captions(pages: Sequence[Page], rng: np.random.Generator) -> list[Page]:
    """The pages, those of kind `wrong_caption` with a caption that is true of another page's subject."""
    honest = [page for page in pages if page.kind in ("shapes", "scene", "document", "chart", "sign")]

    def elsewhere(page: Page) -> str:
        return pick(rng, [other.text for other in honest if other.subject != page.subject])

    return [
        replace(page, text=elsewhere(page), caption_is_true=False) if page.kind == "wrong_caption" else page
        for page in pages
    ]


def with_copies(pages: Sequence[Page], kind: CopyKind, count: int, rng: np.random.Generator) -> list[Page]:
    """The pages and `count` copies of `kind`; an original has one to three copies, and copies of one kind only."""
    free = [i for i, page in enumerate(pages) if page.kind in ("shapes", "scene") and page.group is None]
    originals = [int(i) for i in rng.choice(free, size=(count + 1) // 2, replace=False)]
    grouped = list(pages)
    for n in range(count):
        place = originals[n % len(originals)] if n < len(originals) else int(pick(rng, originals))
        original = replace(grouped[place], group=f"{kind}-{place:04d}")
        grouped[place] = original
        grouped.append(copied(original, kind, n, rng))
    return grouped


def copied(original: Page, kind: CopyKind, number: int, rng: np.random.Generator) -> Page:
    """A page at another path with the original's bytes, or its picture saved anew or at another size."""
    body, encoding = original.body, original.encoding
    with Image.open(io.BytesIO(original.body)) as opened:
        picture = opened.convert("RGB")
    before = imagehash.phash(picture)
    if kind != "exact_copy":
        if kind == "resized_copy":
            scale = max(float(rng.uniform(0.7, 0.95)), 208 / min(picture.size))  # stays above the usual 200 pixels
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        encoding = "WEBP" if rng.random() < 0.3 else "JPEG"
        body = encoded(picture, encoding, int(rng.integers(55, 75)))
    with Image.open(io.BytesIO(body)) as opened:
        after = imagehash.phash(opened.convert("RGB"))
    path = f"/copies/{kind.split('_', maxsplit=1)[0]}/{number:03d}{SUFFIXES[encoding]}"
    text = as_alt_text(original.text, rng)
    page = replace(original, kind=kind, path=path, text=text, body=body, encoding=encoding)
    return replace(page, phash_distance=int(before - after))

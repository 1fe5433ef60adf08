"""Stored images as thumbnails inside an HTML page: small JPEGs of our own encoding, everything from the web escaped."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pyarrow as pa
from PIL import Image

from curate.store import Store

SIDE = 128  # pixels of a thumbnail
MAX_PIXELS = 50_000_000  # a stored image above this is not decoded for a thumbnail

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222}
table{border-collapse:collapse}td{padding:.1rem .8rem .1rem 0}td.n{text-align:right;font-variant-numeric:tabular-nums}
.sub td:first-child{padding-left:1.6rem;color:#666}.bar{background:#dbe7f5;height:.7rem;display:inline-block}
.gallery{display:flex;flex-wrap:wrap;gap:.6rem}figure{margin:0;width:9rem;font-size:12px;overflow-wrap:anywhere}
img{max-width:8rem;max-height:8rem;background:#eee}h2{margin-top:2rem}.group{border-left:3px solid #ccc;padding-left:.6rem;margin:.6rem 0}
svg{background:#f7f7f7;margin-right:1rem}.sets th{font-weight:normal;padding:.1rem .8rem .1rem 0;text-align:left}.sets i{color:#bbb}
"""  # noqa: E501


@dataclass(frozen=True)
class Picture:
    """A stored image with what to say under it."""

    location: dict[str, Any]
    words: str


def gallery(store: Store, pictures: Sequence[Picture]) -> str:
    """Thumbnails side by side, each with its words (up to 400 characters) below."""
    if not pictures:
        return "<p>none"
    table = pa.Table.from_pylist([picture.location for picture in pictures])
    figures = (
        f'<figure><img alt="" src="{_thumbnail(data)}"><figcaption>{escape(picture.words[:400])}</figcaption></figure>'
        for picture, data in zip(pictures, store.read_images(table), strict=True)
    )
    return f"<div class=gallery>{''.join(figures)}</div>"


def _thumbnail(data: bytes | None) -> str:
    """A data URL of a small JPEG; empty when the bytes cannot be shown."""
    if data is None:
        return ""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                return ""
            image.draft("RGB", (SIDE, SIDE))
            small = image.convert("RGB")
            small.thumbnail((SIDE, SIDE))
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    out = io.BytesIO()
    small.save(out, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()

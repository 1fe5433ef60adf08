"""Faces, metadata and addresses: what is hidden is hidden, and nothing else changes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from curate.emit.privacy import blur_faces, mask_contacts, mask_rows, strip_metadata
from curate.emit.step import latest_release
from curate.errors import PlanError, StoreError
from curate.store import Store
from tests.emit.pool import emitter, make_pool, recipe_with, run


def _encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_blur_changes_the_boxes_and_nothing_else() -> None:
    """Guards against a face that is left, a blur of another place, and bytes that differ from run to run."""
    noise = np.random.default_rng(1).integers(0, 255, (120, 200, 3), dtype=np.uint8)
    data = _encoded(noise, "PNG")
    boxes = [[0.1, 0.2, 0.3, 0.6], [0.9, 0.8, 1.0, 1.0]]
    blurred = blur_faces(data, boxes, "png")
    assert blurred == blur_faces(data, boxes, "png")
    changed = (_pixels(blurred) != noise).any(axis=2)
    inside = np.zeros_like(changed)
    for x0, y0, x1, y1 in boxes:
        left, top, right, bottom = int(x0 * 200), int(y0 * 120), int(x1 * 200), int(y1 * 120)
        assert changed[top:bottom, left:right].mean() > 0.98
        assert _pixels(blurred)[top + 9 : bottom - 9, left + 5 : right - 5].std() < 25 < noise.std() / 2
        reach = int(np.ceil(0.1 * np.hypot(right - left, bottom - top))) + 1
        inside[max(0, top - reach) : bottom + reach, max(0, left - reach) : right + reach] = True
    assert not changed[~inside].any()
    assert blur_faces(data, [], "png") is data


def test_strength_scales_with_the_box() -> None:
    """Guards against a large face that a small fixed blur leaves to be known."""
    steps = np.kron(np.indices((10, 10)).sum(0) % 2, np.ones((20, 20))) * 255
    board = np.repeat(steps[:, :, None], 3, 2).astype(np.uint8)
    whole = _pixels(blur_faces(_encoded(board, "PNG"), [[0.0, 0.0, 1.0, 1.0]], "png"))
    part = _pixels(blur_faces(_encoded(board, "PNG"), [[0.4, 0.4, 0.6, 0.6]], "png"))
    assert whole.std() < 20 and part[85:115, 85:115].std() > 40


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_blur_keeps_the_format(kind: str) -> None:
    """Guards against a file whose bytes are not what its name and the manifest say."""
    noise = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    found = blur_faces(_encoded(noise, kind), [[0, 0, 0.5, 0.5]], "jpg" if kind == "JPEG" else "webp")
    assert Image.open(io.BytesIO(found)).format == kind
    with pytest.raises(StoreError, match="does not decode"):
        blur_faces(b"no image", [[0, 0, 1, 1]], "jpg")


def test_metadata_goes_and_pixels_stay() -> None:
    """Guards against places and names in published files, and against pixels that are lost with them."""
    noise = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x010E] = "taken at my home"
    jpeg = _encoded(noise, "JPEG", exif=exif, comment=b"my comment", icc_profile=b"profile")
    notes = PngInfo()
    notes.add_text("Author", "my name")
    png = _encoded(noise, "PNG", pnginfo=notes)
    for data in (jpeg, png):
        bare = strip_metadata(data)
        assert not any(word in bare for word in (b"my home", b"my comment", b"my name"))
        assert (_pixels(bare) == _pixels(data)).all() and strip_metadata(bare) == bare
    assert b"profile" in strip_metadata(jpeg)
    for broken in (jpeg[:30], png[:40], b"\xff\xd8", b""):
        assert strip_metadata(broken) == broken


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to Jane.Doe+x@mail.example.org today", "write to [email] today"),
        ("call +49 170 1234567!", "call [phone]!"),
        ("tel. (030) 123 456 78", "tel. [phone]"),
        ("555-867-5309 now", "[phone] now"),
        ("0049/170/1234567", "[phone]"),
        ("2019-11-21 at 10:30", "2019-11-21 at 10:30"),
        ("1920x1080 photo, 12.50 EUR, 1,234,567 views", "1920x1080 photo, 12.50 EUR, 1,234,567 views"),
        ("twitter @someone", "twitter @someone"),
    ],
)
def test_contacts_are_masked(text: str, masked: str) -> None:
    """Guards against addresses in captions, and against masks over sizes, prices and dates."""
    assert mask_contacts(text) == masked


def test_rows_are_masked() -> None:
    """Guards against a caption that is masked in the txt and open in the manifest."""
    rows = pa.table({"key": ["a", "b"], "text": ["a@b.org", None], "source_text": ["x", "c@d.org"]})
    assert mask_rows(rows).to_pylist() == [
        {"key": "a", "text": "[email]", "source_text": "x"}, {"key": "b", "text": None, "source_text": "[email]"},
    ]  # fmt: skip


def test_a_release_asks_for_boxes(tmp_path: Path) -> None:
    """Guards against `blur_faces: true` that blurs nothing because no scorer found faces; masks reach every member."""
    store = Store(str(tmp_path))
    shards = make_pool(store)
    with pytest.raises(PlanError, match=r"emit\.blur_faces: no table has face_boxes"):
        emitter(store, shards, recipe_with({"all": {}}, blur_faces=True))
    run(emitter(store, shards, recipe_with({"all": {}}, strip_metadata=True, mask_contacts=True)), store, shards)
    assert latest_release(store) is not None

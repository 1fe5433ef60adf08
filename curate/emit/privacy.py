"""What a release does not show of people, where a recipe asks: faces, files' metadata, addresses in captions.

Equal bytes and settings give equal bytes. Only images with faces are encoded anew; metadata is cut out of the file
without touching a pixel. Masks are by pattern: they find what is written as an address, not every trace of a person.
"""

import re
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.errors import StoreError

MARGIN = 0.1  # of a box's diagonal, on each side, and the blur's deviation (Yang et al. 2021, ImageNet's face blurring)
QUALITY = 95  # of what is encoded anew: img2dataset's default
_KEPT_JPEG = {0xE0, 0xE2, 0xEE}  # JFIF, colour profile, Adobe: how pixels are read
_KEPT_PNG = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT"}
_EMAIL = re.compile(r"[A-Za-z0-9._%+\-]{1,64}@(?:[A-Za-z0-9\-]{1,63}\.){1,8}[A-Za-z]{2,24}")
# A run of 9 to 15 digits, as numbers are written for dialling: with a +, or at least two groups. Dates, prices and
# sizes are shorter; an ISBN has no second group of this form and may be masked as well.
_PHONE = re.compile(r"(?<![\w.,])(?:\+\d|\(0?\d{2,5}\)[\s./-]?\d|0?\d{2,5}[\s./-]\d)(?:[\s./()-]{0,2}\d){5,13}(?![\w])")
_TEXTS = ("text", "source_text")

Pixels = npt.NDArray[np.uint8]


def mask_contacts(text: str) -> str:
    """A caption with e-mail addresses as `[email]` and phone numbers of 9 to 15 digits as `[phone]`."""
    return _PHONE.sub(_masked_phone, _EMAIL.sub("[email]", text))


def _masked_phone(found: re.Match[str]) -> str:
    digits = sum(letter.isdigit() for letter in found.group())
    return "[phone]" if 9 <= digits <= 15 else found.group()


def mask_rows(rows: pa.Table) -> pa.Table:
    """Rows with their captions masked."""
    for name in _TEXTS:
        if name in rows.column_names:
            values = [None if text is None else mask_contacts(text) for text in rows.column(name).to_pylist()]
            field = rows.schema.field(name)
            rows = rows.set_column(rows.schema.get_field_index(name), field, pa.array(values, field.type))
    return rows


def blur_faces(data: bytes, boxes: Sequence[Sequence[float]], ext: str) -> bytes:
    """An image with Gaussian blur over relative [x0, y0, x1, y1] boxes, in its own format `ext`.

    Raises StoreError for bytes that do not decode: they are not those in which the faces were found.
    """
    if not boxes:
        return data
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION  # boxes were found in the pixels as they are stored
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise StoreError("an image with face_boxes does not decode, and cannot be blurred; is it still the same tar?")
    blurred = np.asarray(pixels, np.uint8)
    for box in boxes:
        _blur(blurred, box)
    options = {
        "png": [cv2.IMWRITE_PNG_COMPRESSION, 6], "webp": [cv2.IMWRITE_WEBP_QUALITY, QUALITY],
    }.get(ext, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])  # fmt: skip
    done, encoded = cv2.imencode(f".{ext if ext in ('png', 'webp') else 'jpg'}", blurred, options)
    if not done:
        raise StoreError(f"an image of {blurred.shape[1]}x{blurred.shape[0]} pixels cannot be encoded as {ext}")
    return bytes(encoded.tobytes())


def _blur(pixels: Pixels, box: Sequence[float]) -> None:
    """Blur one box with its margin, in place; strength grows with the box."""
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = (value * side for value, side in zip(box, (width, height, width, height), strict=True))
    reach = MARGIN * float(np.hypot(x1 - x0, y1 - y0))
    left, top = max(0, int(np.floor(x0 - reach))), max(0, int(np.floor(y0 - reach)))
    right, bottom = min(width, int(np.ceil(x1 + reach))), min(height, int(np.ceil(y1 + reach)))
    if right <= left or bottom <= top:
        return
    sigma = max(1.0, reach)
    around = int(3 * sigma) + 1  # what the filter sees beyond the box
    a, b = max(0, left - around), max(0, top - around)
    patch = pixels[b : bottom + around, a : right + around]
    soft = cv2.GaussianBlur(patch, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    pixels[top:bottom, left:right] = soft[top - b : bottom - b, left - a : right - a]


def strip_metadata(data: bytes) -> bytes:
    """JPEG or PNG bytes without EXIF, GPS, XMP, IPTC, comments and text; other formats, and what is broken, as is.

    Colour profiles stay. EXIF orientation goes too: trainers do not read it.
    """
    if data.startswith(b"\xff\xd8"):
        return _strip_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _strip_png(data)
    return data


def _strip_jpeg(data: bytes) -> bytes:
    parts = [data[:2]]
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xDA:  # the scans follow, to the end
            return b"".join([*parts, data[at:]])
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFE or (0xE0 <= marker <= 0xEF and marker not in _KEPT_JPEG):
            at = stop
            continue
        if marker == 0xE2 and not data[at + 4 :].startswith(b"ICC_PROFILE"):
            at = stop
            continue
        parts.append(data[at:stop])
        at = stop
    return data


def _strip_png(data: bytes) -> bytes:
    parts = [data[:8]]
    at = 8
    while at + 12 <= len(data):
        stop = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name = data[at + 4 : at + 8]
        if stop > len(data):
            return data
        if name in _KEPT_PNG:
            parts.append(data[at:stop])
        if name == b"IEND":
            return b"".join(parts)
        at = stop
    return data

"""Bytes of a stranger to 8-bit sRGB pixels, or a refusal.

JPEG, nearly all of the web, goes through libjpeg-turbo with DCT scaling; everything else (and CMYK or truncated JPEG)
through Pillow, restricted to the reader of the sniffed format. Runs in a process of its own (`decoder.py`): a decoder
that crashes takes one sample with it. Pixel counts are checked before anything of that size is allocated.
"""

import io
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageCms

from curate.fetch.outcome import Refusal, brief
from curate.fetch.sniff import Jpeg, kind_of, png_chunks, read_jpeg, size_of

Pixels = npt.NDArray[np.uint8]  # height x width x 3, BGR (OpenCV's order, in which it also encodes)

_PILLOW_FORMATS = {
    "jpeg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "bmp": "BMP", "tiff": "TIFF", "avif": "AVIF"
}  # fmt: skip
_PNG_READ = frozenset({b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"iCCP", b"eXIf", b"IEND"})
_HARMLESS = re.compile("extraneous bytes", re.IGNORECASE)  # libjpeg's words; many sound files have some
BAND_PIXELS = 1_000_000
ICC_BYTES = 1_000_000  # real profiles have up to 600 kB


# Bytes a pixel at the worst moment of decoding, measured (20 megapixels, all modes of each format).
_BYTES_A_PIXEL = {"png": 8.0, "gif": 8.0, "webp": 16.2, "bmp": 8.0, "tiff": 12.0, "avif": 12.0}


@dataclass(frozen=True)
class Decoded:
    """Decoded pixels, not yet turned or converted.

    `width`, `height`: of the file, pixels, before DCT scaling and orientation. `plain`: the file's own bytes show
    exactly these pixels in sRGB (no alpha, one frame, 8 bits, no foreign profile, upright).
    """

    kind: str
    pixels: Pixels
    width: int
    height: int
    orientation: int
    icc: bytes | None
    plain: bool


@dataclass(frozen=True)
class Header:
    """What is known before decoding."""

    kind: str
    width: int
    height: int
    jpeg: Jpeg | None = None


def read_header(data: bytes, max_pixels: int) -> Header:
    """Format and size. Raises Refusal: not_image, decode_error, too_many_pixels.

    For TIFF and AVIF the size is read by Pillow, whose open allocates no pixels.
    """
    kind = kind_of(data)
    if kind is None:
        raise Refusal("not_image", f"begins with {data[:12]!r}")
    jpeg = read_jpeg(data) if kind == "jpeg" else None
    size = (jpeg.width, jpeg.height) if jpeg else size_of(data, kind)
    if size is not None:
        _cap(size, max_pixels)
    if kind not in ("jpeg", "png"):  # GIF frames may exceed the screen, WebP's canvas is read twice: ask the reader too
        with _opened(data, kind) as image:
            size = image.size
        _cap(size, max_pixels)
    assert size is not None
    return Header(kind, *size, jpeg)


def decode_bytes(header: Header, denominator: int) -> int:
    """What decoding takes of the memory, at most; the body and the process itself are not counted."""
    jpeg = header.jpeg
    if jpeg is None:
        each = _BYTES_A_PIXEL[header.kind]
    else:
        each = jpeg.coefficients + (3.3 if _is_plain_jpeg(jpeg) else 8.2) / denominator**2
    return int(each * header.width * header.height)


def _is_plain_jpeg(jpeg: Jpeg) -> bool:
    return jpeg.components in (1, 3) and jpeg.precision == 8


def _cap(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise Refusal("too_many_pixels", f"{size[0]}x{size[1]} claimed; {max_pixels} pixels allowed")


def decode(data: bytes, header: Header, denominator: int = 1) -> Decoded:
    """Decode; JPEG at 1/denominator (1, 2, 4, 8) of its size. Raises Refusal("decode_error")."""
    jpeg = header.jpeg
    if jpeg is not None and _is_plain_jpeg(jpeg) and _has_end(data, jpeg):
        pixels = _decode_jpeg(data, -(-header.width // denominator), -(-header.height // denominator))
        icc = jpeg.icc if transform_of(jpeg.icc, "RGB") is not None else None
        plain = jpeg.orientation == 1 and icc is None
        return Decoded("jpeg", pixels, jpeg.width, jpeg.height, jpeg.orientation, icc, plain)
    return _decode_pillow(data, header, denominator)


def _decode_jpeg(data: bytes, width: int, height: int) -> Pixels:
    """Pixels of the whole, at the scale that has this size. libjpeg goes on in grey where data is missing, and says so.

    libjpeg-turbo through simplejpeg gives OpenCV's pixels in 0.2 ms less, for 512 of 1,280 pixels.
    """
    for strict in (True, False):
        try:
            pixels = simplejpeg.decode_jpeg(data, "BGR", min_width=width, min_height=height, strict=strict)
        except ValueError as error:
            if not strict or not _HARMLESS.search(str(error)):
                raise Refusal("decode_error", brief(str(error))) from None
        else:
            return np.asarray(pixels, np.uint8)
    raise AssertionError("unreachable")


def _has_end(data: bytes, jpeg: Jpeg) -> bool:
    """Without EOI libjpeg may be content with less than all rows; Pillow, which counts them, gets those."""
    return data.rfind(b"\xff\xd9", jpeg.scan) > 0


def _opened(data: bytes, kind: str) -> Image.Image:
    if kind == "png":
        data = _without_text(data)
    try:
        return Image.open(io.BytesIO(data), formats=[_PILLOW_FORMATS[kind]])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # outside of a decoder process
        raise Refusal("too_many_pixels", brief(error)) from None
    except Exception as error:  # whatever a reader raises on hostile bytes means one thing
        raise Refusal("decode_error", brief(error)) from None


def _without_text(data: bytes) -> bytes:
    """A PNG without what Pillow would inflate before it comes to the pixels: text, a bloated profile, other frames."""
    kept = []
    for name, start, stop in png_chunks(data):
        if name == b"iCCP" and not _inflates_below(data[start + 8 : stop - 4], ICC_BYTES):
            continue
        if name in _PNG_READ:
            kept.append(data[start:stop])
    return data[:8] + b"".join(kept)


def _inflates_below(profile: bytes, limit: int) -> bool:
    """Whether an iCCP chunk's profile (name, NUL, method, zlib stream) stays below `limit` bytes."""
    try:
        return len(zlib.decompressobj().decompress(profile.partition(b"\0")[2][1:], limit)) < limit
    except zlib.error:
        return False


def _decode_pillow(data: bytes, header: Header, denominator: int) -> Decoded:
    with _opened(data, header.kind) as image:
        try:
            if denominator > 1:
                image.draft(None, (header.width // denominator, header.height // denominator))
            single = header.kind == "tiff" or getattr(image, "n_frames", 1) == 1
            icc = image.info.get("icc_profile")
            image.load()
            orientation = image.getexif().get(0x0112, 1)  # after loading: Pillow turns a TIFF itself
            mode = image.mode
            pixels, icc = _to_bgr(image, icc)
        except Exception as error:
            raise Refusal("decode_error", brief(error)) from None
    orientation = orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
    deep_or_moving = header.kind == "png" and (data[24] > 8 or b"acTL" in data[: data.find(b"IDAT")])
    opaque = mode in ("RGB", "L", "P", "1") and "transparency" not in image.info
    plain = single and opaque and orientation == 1 and icc is None and not deep_or_moving
    return Decoded(header.kind, pixels, header.width, header.height, orientation, icc, plain)


def _to_bgr(image: Image.Image, icc: bytes | None) -> tuple[Pixels, bytes | None]:
    """To 8-bit colours: alpha over white, 16 bits by their high byte, CMYK by its profile. Returns a profile left to
    apply.

    An RGB profile is applied after resizing, when there are fewer pixels; one of another colour space only fits here.
    A band of rows at a time: each step of the way takes 4 bytes a pixel.
    """
    if image.mode.startswith(("I", "F")):
        levels = _to_8_bits(np.asarray(image), image.mode)
        return np.repeat(levels[:, :, None], 3, axis=2), None
    transform = transform_of(icc, "CMYK") if image.mode == "CMYK" else None
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(image.height, top + rows)))
        rgb = _to_rgb(band) if transform is None else _apply(band, transform)
        pixels[top : top + rows] = np.asarray(rgb)[:, :, ::-1]
    return pixels, icc if image.mode != "CMYK" and transform_of(icc, "RGB") is not None else None


def _to_rgb(image: Image.Image) -> Image.Image:
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layered = image.convert("RGBA")
        flat = Image.new("RGB", layered.size, (255, 255, 255))
        flat.paste(layered, mask=layered.getchannel("A"))
        return flat
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(values: npt.NDArray[Any], mode: str) -> npt.NDArray[np.uint8]:
    """Integers of 16 bits, or floats, to bytes; a few rows at a time, since each step takes 8 bytes a pixel."""
    white = 65_535.0
    if mode == "F":
        brightest = np.fmax.reduce(values, axis=None, initial=0.0)  # passes over NaN
        white = next((white for white in (1.0, 255.0) if brightest <= white), white)
    levels = np.empty(values.shape, np.uint8)
    rows = max(1, BAND_PIXELS // max(1, values.shape[1]))
    for top in range(0, len(values), rows):
        part = np.nan_to_num(values[top : top + rows].astype(np.float64)) * (255.0 / white)
        levels[top : top + rows] = part.clip(0, 255).round()
    return levels


def to_srgb(pixels: Pixels, icc: bytes | None) -> Pixels:
    """Pixels in the profile's space to sRGB; unchanged without a usable RGB profile."""
    transform = transform_of(icc, "RGB")
    if transform is None:
        return pixels
    converted = np.empty_like(pixels)
    rows = max(1, BAND_PIXELS // pixels.shape[1])
    for top in range(0, len(pixels), rows):
        band = Image.fromarray(np.ascontiguousarray(pixels[top : top + rows, :, ::-1]))
        converted[top : top + rows] = np.asarray(_apply(band, transform))[:, :, ::-1]
    return converted


def _apply(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


@lru_cache(maxsize=64)
def transform_of(icc: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way from this profile to sRGB; None when there is nothing to do or the profile is unusable.

    Cached: a few dozen profiles cover the web, and building one takes longer than using it on a small picture.
    """
    if not icc or len(icc) > ICC_BYTES:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        space = str(getattr(profile.profile, "xcolor_space", "")).strip()
        if space != mode:
            return None
        if mode == "RGB" and (profile.profile.profile_description or "").lower().startswith(("srgb", "c2")):
            return None
        return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None

"""One body to one stored picture: checked, resized as img2dataset would, encoded, stripped. A pure function.

Equal bytes and settings give equal bytes. Sizes are those a viewer shows (EXIF orientation applied). Refuses nothing by
name: only content counts.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from curate.fetch.decode import Header, Pixels, decode, decode_bytes, read_header, to_srgb
from curate.fetch.outcome import Picture, Refusal
from curate.fetch.strip import stripped

EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
PNG_LEVEL = 6  # img2dataset's png quality is 0–9; a value beyond is a jpg quality left in the recipe
# A JPEG is decoded at 1/2, 1/4 or 1/8 only while this many decoded pixels remain per stored one along a side. Measured
# on 163 real photographs and documents, PSNR against full decode + area, median (5th percentile), CPU:
# to 256 px: 2.0: 47 (36) dB, 2.8 ms; 1.25: 42 (34) dB, 2.2 ms; 1.0: 40 (33) dB, 2.0 ms;
# to 512 px: 2.0: 49 (41) dB, 4.2 ms; 1.25: 46 (39) dB, 3.4 ms; 1.0: 46 (38) dB, 3.2 ms; full decode + area: 8.7 ms.
SCALE_MARGIN = 1.0
LARGE_BYTES = 50_000_000  # of a decoder's memory: beyond, only one of a worker's decoders is at it at a time
COPIES_BYTES = 6  # a pixel, of a picture that is not made smaller: turned, encoded
ALONE = nullcontext()
LONGEST_FILTER = 4.0  # source pixels per stored one; beyond, five taps no longer cover the box


@dataclass(frozen=True)
class ImageSettings:
    """What a picture must be and how it is stored; names and meanings are img2dataset's. Sizes in pixels."""

    image_size: int = 256
    resize_mode: str = "keep_ratio_largest"
    resize_only_if_bigger: bool = True
    encode_format: str = "jpg"
    encode_quality: int = 95
    skip_reencode: bool = True
    strip_metadata: bool = True
    min_image_size: int = 0
    max_aspect_ratio: float | None = None
    max_pixels: int = 50_000_000
    decode_memory_mb: int = 300
    with_phash: bool = False


def process(data: bytes, settings: ImageSettings, turn: AbstractContextManager[object] = ALONE) -> Picture:
    """Check, decode, resize and encode one body. Never raises for what the bytes hold. Large ones wait for `turn`."""
    try:
        return _process(data, settings, turn)
    except Refusal as refusal:
        return Picture(refusal.status, refusal.error)
    except MemoryError:
        return Picture("decode_error", "out of memory while decoding")


def _process(data: bytes, settings: ImageSettings, turn: AbstractContextManager[object]) -> Picture:
    header = read_header(data, settings.max_pixels)
    _check_shape(header, settings)
    size = resized(header.width, header.height, settings)
    may_keep = size is None and settings.skip_reencode and EXTENSIONS.get(header.kind) == settings.encode_format
    denominator = _denominator(header, size, may_keep and not settings.with_phash)
    needed = decode_bytes(header, denominator) + (0 if size else COPIES_BYTES * header.width * header.height)
    if needed > 1_000_000 * settings.decode_memory_mb:
        what = f"{header.width}x{header.height} of {header.kind} take {needed // 1_000_000} MB to decode"
        raise Refusal("too_many_pixels", f"{what}; fetch.decode_memory_mb is {settings.decode_memory_mb}")
    with turn if needed > LARGE_BYTES else ALONE:
        return _picture(data, settings, header, size, denominator, may_keep=may_keep)


def _picture(
    data: bytes, settings: ImageSettings, header: Header, size: tuple[int, int] | None, denominator: int,
    *, may_keep: bool,
) -> Picture:  # fmt: skip
    decoded = decode(data, header, denominator)
    if may_keep and decoded.plain:
        kept = stripped(data, header) if settings.strip_metadata else data
        if kept is not None:
            phash = perceptual_hash(decoded.pixels) if settings.with_phash else None
            return _stored(kept, settings, header.width, header.height, header, phash=phash)
    if decoded.pixels.shape[:2] != (header.height, header.width) and size is None:
        decoded = decode(data, header)  # decoded small only to see whether the bytes are sound
    pixels = decoded.pixels if size is None else _resize(decoded.pixels, size, header)
    pixels = _turn(to_srgb(pixels, decoded.icc), decoded.orientation)
    phash = perceptual_hash(pixels) if settings.with_phash else None
    if size is not None:
        pixels = _frame(pixels, settings)
    height, width = pixels.shape[:2]
    turned = decoded.orientation >= 5
    return _stored(_encode(pixels, settings), settings, width, height, header, turned=turned, phash=phash)


def _stored(
    data: bytes, settings: ImageSettings, width: int, height: int, header: Header,
    *, turned: bool = False, phash: int | None = None,
) -> Picture:  # fmt: skip
    original = (header.height, header.width) if turned else (header.width, header.height)
    return Picture("ok", None, data, settings.encode_format, width, height, *original, phash)


def _check_shape(header: Header, settings: ImageSettings) -> None:
    short, long = sorted((header.width, header.height))
    if short < settings.min_image_size:
        raise Refusal(
            "too_small", f"{header.width}x{header.height}; the shorter side must have {settings.min_image_size}"
        )
    if settings.max_aspect_ratio is not None and long / short > settings.max_aspect_ratio:
        raise Refusal("bad_ratio", f"{header.width}x{header.height}; at most {settings.max_aspect_ratio:g} to 1")


def resized(width: int, height: int, settings: ImageSettings) -> tuple[int, int] | None:
    """(width, height) after resizing, before cropping or padding; None where the picture is left as it is.

    `keep_ratio` and `center_crop` bring the shorter side to image_size, `keep_ratio_largest` and `border` the longer.
    Source: img2dataset `resizer.py`, with albumentations' rounding.
    """
    if settings.resize_mode == "no":
        return None
    side = min(width, height) if settings.resize_mode in ("keep_ratio", "center_crop") else max(width, height)
    if settings.resize_only_if_bigger and side <= settings.image_size:
        return None
    scale = settings.image_size / side
    return max(1, round(width * scale)), max(1, round(height * scale))


def _denominator(header: Header, size: tuple[int, int] | None, only_check: bool) -> int:
    """How far a JPEG may be scaled down while decoding."""
    if only_check:
        return 8
    if size is None:
        return 1
    ratio = max(header.width / size[0], header.height / size[1]) / SCALE_MARGIN  # the other one is only rounded
    return 8 if ratio >= 8 else 4 if ratio >= 4 else 2 if ratio >= 2 else 1


def _resize(pixels: Pixels, size: tuple[int, int], header: Header) -> Pixels:
    """To `size` (width, height): Lanczos upwards, the equivalent of area averaging downwards.

    OpenCV's INTER_AREA spends 3 ns a source value at ratios that are no whole numbers: 2.2 ms for 1024x683 to 256, more
    than its decoding. Below a ratio of 4 a short symmetric filter of the same variance before linear sampling gives
    the same picture (119 real ones at 512 pixels: median 51 dB against area, 5th percentile 41) in a quarter of the
    time.
    """
    if header.width * header.height <= size[0] * size[1]:
        return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_LANCZOS4), np.uint8)
    width, height = _extent(pixels, header)
    ratios = (width / size[0], height / size[1])
    if ratios == (1, 1):
        return pixels
    if max(ratios) > LONGEST_FILTER:
        return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    across, down = (_smoothing(ratio) for ratio in ratios)
    if len(across) > 1 or len(down) > 1:
        pixels = np.asarray(cv2.sepFilter2D(pixels, -1, across, down, borderType=cv2.BORDER_REFLECT_101), np.uint8)
    scales = (1 / ratios[0], 1 / ratios[1])
    sampled = cv2.resize(pixels, None, fx=scales[0], fy=scales[1], interpolation=cv2.INTER_LINEAR)
    # The part of a pixel beyond the picture's end may have made a row or column more.
    return np.asarray(sampled[: size[1], : size[0]], np.uint8)


def _extent(pixels: Pixels, header: Header) -> tuple[float, float]:
    """(width, height) of the part of the decoded pixels that shows the picture, in decoded pixels.

    A JPEG decoded at 1/d has its sides divided by d and rounded up: 853 rows at 1/4 are 213.25 rows in 214. To take
    them for 214 shifts the picture's end by most of a pixel (PSNR 33 instead of 39 dB at 256 pixels).
    """
    height, width = pixels.shape[:2]
    for denominator in (1, 2, 4, 8):
        if (-(-header.width // denominator), -(-header.height // denominator)) == (width, height):
            return header.width / denominator, header.height / denominator
    return width, height


@lru_cache(maxsize=4096)
def _smoothing(ratio: float) -> npt.NDArray[np.float32]:
    """Symmetric taps whose variance, with that of linear sampling (1/6), is a box's of width `ratio` (ratio²/12)."""
    variance = ratio * ratio / 12 - 1 / 6
    if variance <= 0.02:
        return np.ones(1, np.float32)
    if variance <= 0.5:
        return np.array([variance / 2, 1 - variance, variance / 2], np.float32)
    end = min(1.0, (3 * variance - 2) / (8 - 2 * variance)) if variance > 2 / 3 else 0.0
    taps = np.array([end, 1, 1, 1, end], np.float32)
    return np.asarray(taps / taps.sum(), np.float32)


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """Apply EXIF orientation 1–8."""
    if orientation in (5, 6, 7, 8):
        pixels = np.asarray(cv2.transpose(pixels), np.uint8)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return pixels if flip is None else np.asarray(cv2.flip(pixels, flip), np.uint8)


def _frame(pixels: Pixels, settings: ImageSettings) -> Pixels:
    """Crop or pad to a square where the mode asks for one."""
    side = settings.image_size
    height, width = pixels.shape[:2]
    if settings.resize_mode == "center_crop":
        top, left = (height - side) // 2, (width - side) // 2
        return np.ascontiguousarray(pixels[top : top + side, left : left + side])
    if settings.resize_mode == "border":
        framed = np.full((max(side, height), max(side, width), 3), 255, np.uint8)
        top, left = (framed.shape[0] - height) // 2, (framed.shape[1] - width) // 2
        framed[top : top + height, left : left + width] = pixels
        return framed
    return pixels


def _encode(pixels: Pixels, settings: ImageSettings) -> bytes:
    quality = settings.encode_quality
    if settings.encode_format == "jpg":
        options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    elif settings.encode_format == "webp":
        options = [cv2.IMWRITE_WEBP_QUALITY, quality]
    else:
        options = [cv2.IMWRITE_PNG_COMPRESSION, quality if quality <= 9 else PNG_LEVEL]
    try:
        done, encoded = cv2.imencode(f".{settings.encode_format}", pixels, options)
    except cv2.error:
        done = False
    if not done:
        height, width = pixels.shape[:2]
        raise Refusal("decode_error", f"{width}x{height} pixels do not fit a {settings.encode_format} file")
    return bytes(encoded.tobytes())


def perceptual_hash(pixels: Pixels) -> int:
    """64-bit DCT hash in the bit order of `imagehash.phash`: 8x8 low frequencies of 32x32 grey against their median."""
    grey = Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1])).convert("L")
    small = np.asarray(grey.resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    steps = np.arange(32)
    basis = np.cos(np.pi * np.outer(np.arange(8), 2 * steps + 1) / 64)
    low = basis @ small @ basis.T
    bits = (low > np.median(low)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")

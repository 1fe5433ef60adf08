"""What a file is and how many pixels it claims, from its first bytes and without decoding any.

Names and Content-Type headers are not asked. Only the formats in `KINDS` exist for us: SVG, PDF, PSD, video and the
rest are `not_image`, which keeps most decoders (and their bugs) out of reach.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from curate.fetch.outcome import Refusal

KINDS = ("jpeg", "png", "gif", "webp", "bmp", "tiff", "avif")

_MAGIC = (
    (b"\xff\xd8\xff", "jpeg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"GIF87a", "gif"), (b"GIF89a", "gif"),
    (b"II*\0", "tiff"), (b"MM\0*", "tiff"), (b"II+\0", "tiff"), (b"MM\0+", "tiff"),
)  # fmt: skip
_DIB_SIZES = frozenset({12, 16, 40, 52, 56, 64, 108, 124})
_AVIF_BRANDS = (b"avif", b"avis")
# In entropy-coded data 0xFF is followed by 0x00, a restart marker or fill; anything else is the next marker.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
MAX_SCANS = 100  # libjpeg writes no more, encoders about ten; 50 bytes of a scan cost 25 ms for 30 megapixels
_SOF = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
_SOF_PROGRESSIVE = frozenset({0xC2, 0xCA})
_SOF_EXOTIC = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF})  # lossless, hierarchical: nobody decodes them


def kind_of(data: bytes) -> str | None:
    """One of KINDS by content, or None."""
    for start, kind in _MAGIC:
        if data.startswith(start):
            return kind
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith(b"BM") and len(data) >= 26 and int.from_bytes(data[14:18], "little") in _DIB_SIZES:
        return "bmp"
    if data[4:8] == b"ftyp":
        box = data[8 : max(8, min(int.from_bytes(data[:4], "big"), 256))]
        if any(box[at : at + 4] in _AVIF_BRANDS for at in range(0, len(box), 4)):
            return "avif"
    return None


def size_of(data: bytes, kind: str) -> tuple[int, int] | None:
    """(width, height) in pixels as the header claims; None for kinds whose reader tells without decoding.

    Raises Refusal("decode_error") when the header is broken or claims no pixels.
    """
    try:
        if kind == "png":
            width, height = struct.unpack_from(">II", data, 16)
        elif kind == "gif":
            width, height = struct.unpack_from("<HH", data, 6)
        elif kind == "bmp":
            if int.from_bytes(data[14:18], "little") == 12:
                width, height = struct.unpack_from("<HH", data, 18)
            else:
                width, height = struct.unpack_from("<ii", data, 18)
                height = abs(height)  # negative: top-down
        elif kind == "webp":
            width, height = _webp_size(data)
        else:
            return None
    except struct.error:
        raise Refusal("decode_error", f"{kind} header is cut short") from None
    if width <= 0 or height <= 0:
        raise Refusal("decode_error", f"{kind} header claims {width}x{height} pixels")
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    chunk = data[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


@dataclass(frozen=True)
class Jpeg:
    """The parts of a JPEG header that decide how it is decoded and kept. `segments`: (marker, start, end) of each."""

    width: int
    height: int
    components: int
    precision: int
    orientation: int  # EXIF 1–8
    icc: bytes | None
    scan: int  # offset of the first SOS marker
    coefficients: float  # bytes a pixel that a decoder must hold: of all planes, where they come in several scans
    segments: tuple[tuple[int, int, int], ...] = field(repr=False)


def read_jpeg(data: bytes) -> Jpeg:
    """Walk the segments up to the first scan. Raises Refusal("decode_error") on a header nobody could decode."""
    at, end = 2, len(data)
    frame: tuple[int, int, int, int] | None = None
    orientation, progressive, planes = 1, False, 0.0
    icc: dict[int, bytes] = {}
    segments: list[tuple[int, int, int]] = []
    while at + 4 <= end:
        if data[at] != 0xFF:
            at = data.find(b"\xff", at)  # decoders skip bytes between segments as well
            if at < 0:
                break
            continue
        marker = data[at + 1]
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xD9 or length < 2:
            break
        stop = at + 2 + length
        segments.append((marker, at, stop))
        if marker in _SOF and frame is None and length >= 8:
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            frame = (width, height, components, precision)
            progressive, planes = marker in _SOF_PROGRESSIVE, _planes(data[at + 10 : stop])
        elif marker in _SOF_EXOTIC:
            raise Refusal("decode_error", f"JPEG of an unsupported process (SOF {marker:#x})")
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[at + 10 : stop])
        elif marker == 0xE2 and data[at + 4 : at + 16] == b"ICC_PROFILE\0" and length > 16:
            icc[data[at + 16]] = data[at + 18 : stop]
        elif marker == 0xDA:
            if frame is None:
                break
            if 0 in frame[:3]:
                raise Refusal("decode_error", f"JPEG header claims {frame[0]}x{frame[1]} pixels")
            profile = b"".join(icc[number] for number in sorted(icc)) or None
            held = 0.0 if not progressive and data[at + 4] == frame[2] else _held(data, at, planes)
            return Jpeg(*frame, orientation, profile, at, held, tuple(segments))
        at = stop
    raise Refusal("decode_error", "JPEG ends before its picture begins")


def _held(data: bytes, scan: int, planes: float) -> float:
    """Bytes a pixel of coefficients, of a picture in several scans. Raises Refusal where they are too many."""
    if data.count(b"\xff\xda", scan) > MAX_SCANS:
        raise Refusal("decode_error", f"JPEG of more than {MAX_SCANS} scans")
    return 2 * planes


def _planes(components: bytes) -> float:
    """Samples a pixel, of a frame header's components (id, sampling, table): 3 without subsampling, 1.5 for 4:2:0."""
    sampling = [(part >> 4, part & 15) for part in components[1::3]]
    most = max((h for h, _ in sampling), default=1) * max((v for _, v in sampling), default=1)
    return sum(h * v for h, v in sampling) / max(1, most)


def jpeg_scans_end(data: bytes, header: Jpeg) -> tuple[tuple[tuple[int, int, int], ...], int] | None:
    """Segments from the first scan on, each with its entropy data, and the offset behind EOI; None without EOI."""
    found: list[tuple[int, int, int]] = []
    at = header.scan
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF:
            return None
        if marker == 0xD9:
            return tuple(found), at + 2
        if marker == 0xFF:
            at += 1
            continue
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            following = _NEXT_MARKER.search(data, stop)
            if following is None:
                return None
            stop = following.start()
        found.append((marker, at, stop))
        at = stop
    return (tuple(found), at + 2) if data[at : at + 2] == b"\xff\xd9" else None


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory; 1 when absent or nonsense."""
    order = ">" if tiff[:2] == b"MM" else "<"
    try:
        (first,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, first)
        for number in range(min(entries, 200)):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, first + 2 + 12 * number)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each chunk in turn, whole chunks only; ends behind IEND or where the file is cut."""
    at = 8
    while at + 12 <= len(data):
        name, stop = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if stop > len(data):
            return
        yield name, at, stop
        if name == b"IEND":
            return
        at = stop

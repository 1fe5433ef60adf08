"""Kept bytes without what their owner did not mean to publish: EXIF, GPS, XMP, IPTC, comments, thumbnails, trailers.

Nothing is decoded and no pixel changes. A file whose structure cannot be followed is not kept (None): it is encoded
anew, which strips it as well.
"""

from curate.fetch.decode import Header
from curate.fetch.sniff import jpeg_scans_end, png_chunks

_JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"IEND"})


def stripped(data: bytes, header: Header) -> bytes | None:
    """A JPEG, PNG or WebP file with only what its pixels need; None when that cannot be told."""
    if header.kind == "jpeg":
        return _jpeg(data, header)
    if header.kind == "png":
        return _png(data)
    return _webp(data) if header.kind == "webp" else None


def _jpeg(data: bytes, header: Header) -> bytes | None:
    """Tables, frame, scans and the Adobe marker, which says how colours are coded; ends at EOI."""
    assert header.jpeg is not None
    scans = jpeg_scans_end(data, header.jpeg)
    if scans is None:
        return None
    parts = [b"\xff\xd8"]
    for marker, start, stop in (*header.jpeg.segments[:-1], *scans[0]):
        if marker == 0xE0 and data[start + 4 : start + 9] == b"JFIF\0" and len(parts) == 1:
            parts.append(_JFIF)  # rebuilt: the original may hold a thumbnail
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE) or (
            marker == 0xEE and data[start + 4 : start + 9] == b"Adobe"
        ):
            parts.append(data[start:stop])
    parts.append(b"\xff\xd9")
    return b"".join(parts)


def _png(data: bytes) -> bytes | None:
    chunks = list(png_chunks(data))
    if not chunks or chunks[-1][0] != b"IEND":
        return None
    return data[:8] + b"".join(data[start:stop] for name, start, stop in chunks if name in _PNG_KEPT)


def _webp(data: bytes) -> bytes | None:
    """The picture chunk alone, as a simple file."""
    at = 12
    while at + 8 <= len(data):
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        stop = at + 8 + length + (length & 1)
        if name in (b"VP8 ", b"VP8L"):
            chunk = data[at : at + 8 + length] + b"\0" * (length & 1)
            if at + 8 + length > len(data):
                return None
            return b"RIFF" + (len(chunk) + 4).to_bytes(4, "little") + b"WEBP" + chunk
        at = stop
    return None

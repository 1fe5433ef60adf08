"""Tar members with the same bytes on every machine: no times, no owners, no padding beyond the format's.

Refuses names that the plain USTAR header cannot hold (100 bytes, ASCII): our keys and extensions always fit.
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from curate.errors import StoreError

BLOCK = 512
END = b"\0" * (2 * BLOCK)


def header(name: str, size: int) -> bytes:
    """The 512-byte USTAR header of a plain file: mode 0644, owner 0, time 0."""
    encoded = name.encode("ascii", "strict") if name.isascii() else b""
    if not 0 < len(encoded) <= 100 or size >= 8**11:
        raise StoreError(f"tar member {name!r} of {size} bytes does not fit a USTAR header")
    block = bytearray(BLOCK)
    block[: len(encoded)] = encoded
    block[100:108] = b"0000644\0"
    block[108:116] = block[116:124] = b"0000000\0"
    block[124:136] = b"%011o\0" % size
    block[136:148] = b"00000000000\0"
    block[148:156] = b" " * 8  # the checksum counts itself as blanks
    block[156:157] = b"0"
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padding(size: int) -> bytes:
    """The zeros that fill a member of `size` bytes to whole blocks."""
    return b"\0" * (-size % BLOCK)


class TarWriter:
    """Appends members to a binary stream and says at which byte their data starts."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.position = 0  # bytes written

    def add(self, name: str, data: bytes) -> int:
        """Write one member; returns the offset of its data in the tar, in bytes."""
        self._stream.write(header(name, len(data)))
        offset = self.position + BLOCK
        self._stream.write(data)
        pad = padding(len(data))
        if pad:
            self._stream.write(pad)
        self.position = offset + len(data) + len(pad)
        return offset

    def finish(self) -> None:
        """Write the two empty blocks that end a tar."""
        self._stream.write(END)
        self.position += len(END)


def members(stream: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(name, data offset, size) of every plain file in a tar, without reading the data.

    Raises `tarfile.ReadError` on a broken tar. Long names (PAX, GNU) are resolved.
    """
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for info in archive:
            if info.isreg():
                yield info.name, info.offset_data, info.size

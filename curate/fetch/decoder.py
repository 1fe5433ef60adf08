"""The decoding process: bodies and pictures by shared memory, everything else over a socket.

It exists to be killed. A hostile file that crashes, hangs or inflates a decoder takes this process and one sample with
it, never the shard. It opens no file and no connection, and ends when its parent does.
"""

import contextlib
import fcntl
import json
import mmap
import os
import resource
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import cv2
from PIL import Image

from curate.fetch.images import ImageSettings, process
from curate.fetch.outcome import Picture

REQUEST = struct.Struct("<Q")  # bytes of the body
REPLY = struct.Struct("<IQ")  # bytes of the JSON facts, bytes of the image
MEMORY_BYTES = 6 * 1024**3  # address space, of which `decode_memory_mb` bounds the part that is used
_FACTS = ("status", "error", "ext", "width", "height", "original_width", "original_height", "phash")


def pack(picture: Picture) -> bytes:
    """A picture as one message, but for its image."""
    facts = json.dumps([getattr(picture, name) for name in _FACTS]).encode()
    return REPLY.pack(len(facts), len(picture.data)) + facts


def unpack(message: bytes | bytearray, memory: mmap.mmap) -> Picture | None:
    """The picture of a message, its image from `memory`; None while parts of the message are missing."""
    if len(message) < REPLY.size:
        return None
    facts_length, image_length = REPLY.unpack_from(message)
    if len(message) < REPLY.size + facts_length:
        return None
    status, error, *rest = json.loads(message[REPLY.size :])
    return Picture(status, error, memory[:image_length], *rest)


def shared_bytes(body_bytes: int, settings: ImageSettings) -> int:
    """Of memory that holds any body, and any image of it: stored pixels take 3 bytes at the worst, in a PNG."""
    return max(body_bytes, 4 * max(settings.max_pixels, settings.image_size**2)) + 1_000_000


def settings_text(settings: ImageSettings) -> str:
    """Settings as a command-line argument."""
    return json.dumps(asdict(settings))


@contextlib.contextmanager
def _turn(lock: int) -> Iterator[None]:
    """Alone among the decoders of a worker; the system ends it with the process."""
    fcntl.lockf(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.lockf(lock, fcntl.LOCK_UN)


def serve(link: socket.socket, memory: mmap.mmap, lock: int, settings: ImageSettings) -> None:
    """Answer requests until the other end closes.

    A request is the length of the body that lies in `memory`; the image takes its place there.
    """
    _confine()
    while len(request := link.recv(REQUEST.size, socket.MSG_WAITALL)) == REQUEST.size:
        (length,) = REQUEST.unpack(request)
        picture = process(memory[:length], settings, _turn(lock))
        if len(picture.data) > len(memory):
            picture = Picture("decode_error", f"an image of {len(picture.data)} bytes")
        memory[: len(picture.data)] = picture.data
        link.sendall(pack(picture))


def _confine() -> None:
    """Limits that a decoder of pictures never needs to reach, and no chatter of C libraries on the user's terminal."""
    cv2.setNumThreads(1)  # parallel over pictures, not inside one
    Image.MAX_IMAGE_PIXELS = None  # `max_pixels` is counted from the header, before Pillow is asked
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 1_000_000),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)


def main(arguments: list[str]) -> None:
    """`SOCKET MEMORY LOCK SETTINGS`: three descriptors and JSON, as the pool passes them."""
    values: dict[str, Any] = json.loads(arguments[3])
    memory = mmap.mmap(int(arguments[1]), 0)
    with contextlib.closing(socket.socket(fileno=int(arguments[0]))) as link:
        link.setblocking(True)
        serve(link, memory, int(arguments[2]), ImageSettings(**values))


if __name__ == "__main__":
    main(sys.argv[1:])

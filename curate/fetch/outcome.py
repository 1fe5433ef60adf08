"""What became of one URL: a status, and the bytes when all went well.

The vocabulary is `curate.schema.STATUSES`; it is spelled again as a type so that a misspelt status does not type-check
(a test holds the two equal). Nothing here decides anything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal[
    "ok", "http_4xx", "http_5xx", "timeout", "dns", "connect", "tls", "too_slow", "too_large", "too_many_pixels",
    "not_image", "decode_error", "decode_crash", "too_small", "bad_ratio", "opted_out", "robots", "blocked_address",
    "blocked_list", "hash_mismatch", "bad_url", "empty", "removed", "not_asked",
]  # fmt: skip

ERROR_CHARS = 200  # servers put whole pages into reason phrases


class Refusal(Exception):
    """Control flow inside the fetcher: ends one URL with a status. Never leaves the package."""

    def __init__(self, status: Status, error: str) -> None:
        super().__init__(f"{status}: {error}")
        self.status = status
        self.error = error


@dataclass(frozen=True)
class Body:
    """What a server sent for a URL: `data` (decompressed) when status is ok. `release` once it is needed no longer."""

    status: Status
    error: str | None = None
    data: bytes | bytearray = b""
    release: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Picture:
    """What became of a body: the stored image when status is ok. Sizes in pixels; `original_*` as displayed."""

    status: Status
    error: str | None = None
    data: bytes = b""
    ext: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    phash: int | None = None  # 64 bits, of the decoded picture; only when asked for


@dataclass(frozen=True)
class Outcome:
    """One row of `images` before its place in the tar is known. `image` is empty unless status is ok."""

    status: Status
    error: str | None = None
    image: bytes = b""
    ext: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    original_bytes: int | None = None
    sha256: str | None = None  # of the bytes as served, lower-case hex


def brief(error: BaseException | str) -> str:
    """An error on one short printable line, as stored in `images.error`."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * ERROR_CHARS]).split())
    return line[:ERROR_CHARS]

"""Lists of what must never be stored: domains, URLs, hashes of URLs and of bytes, perceptual hashes.

A hit is a status and nothing else is kept of the sample. Lists are text, one entry a line, `#` begins a comment; the
kind of a hash is told by its length. They may lie anywhere fsspec reaches. 16 million hashes (Re-LAION) take 130 MB.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import fsspec
import numpy as np
import numpy.typing as npt
from yarl import URL

from curate.errors import ConfigError

_HASH_OF_DIGITS = {32: "md5", 40: "sha1", 64: "sha256"}
Prefixes = npt.NDArray[np.uint64]  # sorted; the first 8 bytes of each digest: 16 M of them hit by chance once in 10^12


def _lines(path: str) -> Iterator[str]:
    try:
        with fsspec.open(path, "rt", encoding="utf-8-sig") as stream:
            for line in stream:
                entry = line.partition("#")[0].strip() if "://" not in line else line.strip()
                if entry:
                    yield entry
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"block list {path}: cannot be read: {error}") from None


def _domain(entry: str, path: str) -> str:
    """A name as DNS has it: without the wildcard, in lower case, other scripts in Punycode."""
    name = entry.lower().lstrip("*.").rstrip(".")
    try:
        return URL.build(scheme="http", host=name).raw_host or ""
    except ValueError:
        raise ConfigError(f"block list {path}: {entry[:80]!r} is no domain; write e.g. evil.example") from None


def _digests(paths: Iterable[str]) -> dict[str, Prefixes]:
    found: dict[str, list[int]] = {}
    for path in paths:
        for entry in _lines(path):
            kind = _HASH_OF_DIGITS.get(len(entry))
            try:
                prefix = int(entry[:16], 16)
                int(entry, 16)
            except ValueError:
                kind = None
            if kind is None:
                raise ConfigError(f"block list {path}: {entry[:80]!r} is no MD5, SHA-1 or SHA-256 in hex")
            found.setdefault(kind, []).append(prefix)
    return {kind: np.unique(np.array(values, np.uint64)) for kind, values in sorted(found.items())}


def _holds(prefixes: Prefixes, digest: bytes) -> bool:
    value = np.uint64(int.from_bytes(digest[:8], "big"))
    at = int(np.searchsorted(prefixes, value))
    return at < len(prefixes) and prefixes[at] == value


@dataclass(frozen=True)
class BlockList:
    """All lists of a recipe; empty ones cost nothing. `phash_radius` in bits."""

    domains: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    url_digests: dict[str, Prefixes] = field(default_factory=dict)
    digests: dict[str, Prefixes] = field(default_factory=dict)
    phashes: npt.NDArray[np.uint64] | None = None
    phash_radius: int = 0

    @classmethod
    def load(
        cls, domains: Sequence[str] = (), urls: Sequence[str] = (), url_hashes: Sequence[str] = (),
        hashes: Sequence[str] = (), phashes: Sequence[str] = (), phash_radius: int = 0,
    ) -> "BlockList":  # fmt: skip
        """Read the files or URLs of each kind. Raises ConfigError naming the list and the entry."""
        perceptual: list[int] = []
        for path in phashes:
            for entry in _lines(path):
                try:
                    perceptual.append(int(entry, 16))
                except ValueError:
                    raise ConfigError(f"block list {path}: {entry[:80]!r} is no 16-digit pHash") from None
                if len(entry) != 16:
                    raise ConfigError(f"block list {path}: {entry[:80]!r} is no 16-digit pHash")
        return cls(
            frozenset(_domain(entry, path) for path in domains for entry in _lines(path)),
            frozenset(entry for path in urls for entry in _lines(path)),
            _digests(url_hashes),
            _digests(hashes),
            np.unique(np.array(perceptual, np.uint64)) if perceptual else None,
            phash_radius,
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Hash kinds of bytes that must be computed."""
        return tuple(self.digests)

    def refuses_url(self, url: URL, text: str) -> str | None:
        """Why a URL (`text` as the table or the redirect spells it) is not asked for."""
        host = (url.raw_host or "").lower().rstrip(".")  # as DNS has it: not every `xn--` can be decoded
        while host and self.domains:
            if host in self.domains:
                return f"domain {host}"
            host = host.partition(".")[2]
        if text in self.urls or str(url) in self.urls:
            return "URL"
        for kind, prefixes in self.url_digests.items():
            if _holds(prefixes, hashlib.new(kind, text.encode("utf-8", "replace"), usedforsecurity=False).digest()):
                return f"{kind} of the URL"
        return None

    def refuses_bytes(self, data: bytes | bytearray) -> str | None:
        """Why bytes as served are not kept."""
        for kind, prefixes in self.digests.items():
            if _holds(prefixes, hashlib.new(kind, data, usedforsecurity=False).digest()):
                return f"{kind} of the bytes"
        return None

    def refuses_phash(self, value: int | None) -> str | None:
        """Why a picture is not kept: a listed perceptual hash within the radius."""
        if self.phashes is None or value is None:
            return None
        distance = int(np.bitwise_count(self.phashes ^ np.uint64(value)).min())
        return f"pHash within {distance} bits" if distance <= self.phash_radius else None

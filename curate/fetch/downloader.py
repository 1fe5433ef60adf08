"""Rows in, outcomes out, in order: every URL of a shard fetched once, checked, and turned into its stored picture.

The order of the work is: address and lists, robots.txt, headers, bytes, hashes, then the decoder process. Whatever a
later check refuses is never written anywhere.
"""

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from curate.config import FetchSettings
from curate.errors import PlanError
from curate.fetch.blocklist import BlockList
from curate.fetch.client import Client
from curate.fetch.crawl import Crawl
from curate.fetch.decoder_pool import DecoderPool
from curate.fetch.guard import Guard
from curate.fetch.images import ImageSettings
from curate.fetch.outcome import Body, Outcome
from curate.fetch.resolver import Lookup
from curate.fetch.spool import Fetched, Spool, digest_of
from curate.scratch import Parts

_HASH_OF_DIGITS = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}


@dataclass(frozen=True)
class Row:
    """One row of the table: its URL and, with verify_hash, the digest that its bytes must have (hex)."""

    url: str | None
    expected: str | None = None


def check_settings(settings: FetchSettings) -> None:
    """Raise PlanError for what would fail or offend later: nobody to write to on a run beyond one's own networks."""
    Guard(settings.allow_networks)
    if settings.engine == "img2dataset" and settings.proxy is not None:
        raise PlanError("fetch.proxy: only engine: curate asks through a proxy; img2dataset's opener connects itself")
    if settings.contact is None and not settings.allow_networks:
        raise PlanError(
            "fetch.contact is not set: servers must be able to reach whoever runs this; write "
            "`contact: you@example.org` (or a page), or name your own networks in fetch.allow_networks"
        )


def guard_of(settings: FetchSettings) -> Guard:
    """The guard of a recipe: without a contact address only one's own networks are reachable."""
    return Guard(settings.allow_networks, public=settings.contact is not None)


def image_settings(settings: FetchSettings) -> ImageSettings:
    """The part of the settings that decides how a picture is stored."""
    return ImageSettings(
        settings.image_size, settings.resize_mode, settings.resize_only_if_bigger, settings.encode_format,
        settings.encode_quality, settings.skip_reencode, settings.strip_metadata, settings.min_image_size,
        settings.max_aspect_ratio, settings.max_pixels, settings.decode_memory_mb, bool(settings.block_phashes),
    )  # fmt: skip


def load_lists(settings: FetchSettings) -> BlockList:
    """Read the block lists that the settings name. Raises ConfigError."""
    return BlockList.load(
        settings.block_domains, settings.block_urls, settings.block_url_hashes, settings.block_hashes,
        settings.block_phashes, settings.block_phash_radius,
    )  # fmt: skip


class Downloader:
    """One worker's fetcher, kept over many shards: connections, robots.txt, resolver cache and decoders live on.

    `lookup` replaces the resolver (tests). Not thread-safe.
    """

    def __init__(self, settings: FetchSettings, lists: BlockList | None = None, lookup: Lookup | None = None) -> None:
        check_settings(settings)
        self._settings, self._lookup = settings, lookup
        self._lists = load_lists(settings) if lists is None else lists
        self._guard = guard_of(settings)
        self._runner = asyncio.Runner()
        self._client: Client | None = None
        self._pool = DecoderPool(image_settings(settings), settings.decoders, settings.max_bytes)

    def __enter__(self) -> "Downloader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End decoders and connections."""
        if self._client is not None:
            self._runner.run(self._client.close())
        self._runner.run(self._pool.close())
        self._runner.close()

    def fetch(
        self, rows: Sequence[Row], scratch: Path, purpose: str = "", parts: Parts | None = None
    ) -> Iterator[Outcome]:
        """Outcomes of the rows, in their order.

        What a killed attempt left in `scratch` (or `parts`) under the same `purpose` is not fetched again. Memory does
        not grow with the rows' images. Raises StageError or OSError when the fetcher itself cannot work.
        """
        with Spool(scratch, purpose, parts) as spool:
            self._runner.run(self._fill(rows, spool))
            for row in rows:
                yield _of_row(row, spool.get(digest_of(row.url)))

    async def _fill(self, rows: Sequence[Row], spool: Spool) -> None:
        if self._client is None:
            self._client = Client(self._settings, self._guard, self._lookup)
        wanted: dict[str | None, set[str | None]] = {}
        for row in rows:
            if digest_of(row.url) not in spool:
                wanted.setdefault(row.url, set()).add(_normal(row.expected))
        urls = list(wanted)

        async def finish(number: int, body: Body) -> None:
            spool.add(digest_of(urls[number]), await self._picture(body, wanted[urls[number]]))

        await Crawl(self._client, self._guard, self._lists, self._settings, finish).run(list(enumerate(urls)))

    async def _picture(self, body: Body, expected: set[str | None]) -> Fetched:
        """From bytes to what is stored. `expected` holds the digests that rows of this URL ask for, None for any."""
        if body.status != "ok":
            return Fetched(Outcome(body.status, body.error))
        sha256 = hashlib.sha256(body.data).hexdigest()
        facts = Outcome("ok", original_bytes=len(body.data), sha256=sha256)
        matched = tuple(sorted(text for text in expected if text is not None and _has_digest(body.data, text)))
        if None not in expected and not matched:
            return Fetched(replace(facts, status="hash_mismatch", error="other bytes than the table says"))
        listed = self._lists.refuses_bytes(body.data)
        if listed:
            return Fetched(replace(facts, status="blocked_list", error=listed))
        picture = await self._pool.process(body.data)
        listed = self._lists.refuses_phash(picture.phash)
        if listed:
            return Fetched(replace(facts, status="blocked_list", error=listed))
        return Fetched(replace(
            facts, status=picture.status, error=picture.error, image=picture.data, ext=picture.ext,
            width=picture.width, height=picture.height,
            original_width=picture.original_width, original_height=picture.original_height,
        ), matched)  # fmt: skip


def _normal(expected: str | None) -> str | None:
    """A digest as written in a table: empty means none, case does not matter."""
    return expected.strip().lower() if expected and expected.strip() else None


def _has_digest(data: bytes | bytearray, expected: str) -> bool:
    kind = _HASH_OF_DIGITS.get(len(expected))
    return kind is not None and hashlib.new(kind, data, usedforsecurity=False).hexdigest() == expected


def _of_row(row: Row, fetched: Fetched) -> Outcome:
    """The row's own outcome: its URL's, unless this row expected other bytes."""
    expected, outcome = _normal(row.expected), fetched.outcome
    if expected is None or outcome.status != "ok" or expected in fetched.matched:
        return outcome
    return Outcome(
        "hash_mismatch", "other bytes than the table says", original_bytes=outcome.original_bytes, sha256=outcome.sha256
    )

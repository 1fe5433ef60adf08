"""`fetch.engine: img2dataset`: that tool's own Downloader for a shard, under our guard.

For those who want its exact behaviour (its threads, retries, resizing): the class is used as released, and gives rows
through a sample writer of ours. Only what it opens is replaced (`guarded_opener.py`). It decodes in this process, so a
file that crashes its decoder costs the shard a try, and it knows neither per-host caps nor HTTP connections that are
used twice.
"""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from curate.config import FetchSettings
from curate.errors import StageError
from curate.fetch.blocklist import BlockList
from curate.fetch.consent import AGENTS, OPT_OUTS
from curate.fetch.decode import read_header
from curate.fetch.downloader import Row, check_settings, guard_of, load_lists
from curate.fetch.guarded_opener import GuardedOpener
from curate.fetch.images import PNG_LEVEL
from curate.fetch.outcome import Outcome, Refusal, Status, brief
from curate.fetch.spool import Fetched, Spool, digest_of
from curate.fetch.strip import stripped
from curate.schema import FAILURES
from curate.scratch import Parts

_THREADS = 32
# Its messages, where they are not ours already.
_MESSAGES: tuple[tuple[str, Status], ...] = (
    ("unknown url type", "bad_url"),
    ("Use of image disallowed", "opted_out"),
    ("hash mismatch", "hash_mismatch"),
    ("image too small", "too_small"),
    ("image area too large", "too_many_pixels"),
    ("aspect ratio too large", "bad_ratio"),
)


class Img2datasetDownloader:
    """The same two methods as `downloader.Downloader`, over img2dataset."""

    def __init__(self, settings: FetchSettings, lists: BlockList | None = None) -> None:
        check_settings(settings)
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the internet for a newer release
        from img2dataset.resizer import Resizer  # noqa: PLC0415  # 4 s of imports that only this engine needs

        self._settings = settings
        self._opener = GuardedOpener(settings, guard_of(settings), load_lists(settings) if lists is None else lists)
        quality = settings.encode_quality
        self._resizer = Resizer(
            settings.image_size, settings.resize_mode, settings.resize_only_if_bigger,
            encode_quality=PNG_LEVEL if settings.encode_format == "png" and quality > 9 else quality,
            encode_format=settings.encode_format, skip_reencode=settings.skip_reencode,
            min_image_size=settings.min_image_size, max_image_area=settings.max_pixels,
            max_aspect_ratio=settings.max_aspect_ratio or math.inf,
        )  # fmt: skip

    def close(self) -> None:
        """End its helper thread."""
        self._opener.close()

    def fetch(
        self, rows: Sequence[Row], scratch: Path, purpose: str = "", parts: Parts | None = None
    ) -> Iterator[Outcome]:
        """Outcomes of the rows, in their order; what a killed attempt left in `scratch` is not asked for again."""
        with Spool(scratch, "img2dataset " + purpose, parts) as spool:
            todo = [number for number in range(len(rows)) if digest_of(str(number)) not in spool]
            if todo:
                self._download([rows[number] for number in todo], todo, spool)
            lost = [number for number in todo if digest_of(str(number)) not in spool]
            if lost:
                raise StageError(f"img2dataset gave no row for {len(lost)} of {len(rows)} URLs; see its messages above")
            for number in range(len(rows)):
                yield spool.get(digest_of(str(number))).outcome

    def _download(self, rows: Sequence[Row], numbers: Sequence[int], spool: Spool) -> None:
        from img2dataset.downloader import Downloader  # noqa: PLC0415

        kinds = {len(row.expected) for row in rows if row.expected}
        verified = len(kinds) == 1 and all(row.expected for row in rows)
        if kinds and not verified:
            raise StageError(
                "img2dataset verifies hashes only when every row has one of the same kind; use engine: curate"
            )
        kind = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}.get(min(kinds, default=0)) if verified else None
        table = {"url": [row.url or "" for row in rows], "number": [str(number) for number in numbers]}
        if kind is not None:
            table[kind] = [(row.expected or "").lower() for row in rows]
        with TemporaryDirectory(prefix="curate-img2dataset-") as folder:
            source = Path(folder) / "shard.feather"
            with source.open("wb") as stream:
                arrow = pa.table(table)
                with pa.ipc.new_file(stream, arrow.schema) as writer:
                    writer.write_table(arrow)
            download = Downloader(
                _writer(spool, self._settings, self._opener.sizes), self._resizer,
                min(_THREADS, self._settings.concurrency),
                save_caption=False, extract_exif=False, output_folder=folder, column_list=list(table),
                timeout=self._settings.timeout_s, number_sample_per_shard=max(2, len(rows)), oom_shard_count=5,
                compute_hash="sha256", verify_hash_type=kind, encode_format=self._settings.encode_format,
                retries=self._settings.retries, user_agent_token=AGENTS[0],
                disallowed_header_directives=sorted(OPT_OUTS) if self._settings.opt_out else None,
            )  # fmt: skip
            with self._opener.installed():
                download.download_shard((0, str(source)))
            self._opener.sizes.clear()  # rows with the same bytes share an entry: none is done before all are


def _writer(spool: Spool, settings: FetchSettings, sizes: dict[str, int]) -> type:
    """A sample writer class, as img2dataset wants one, that puts rows into the spool."""

    class Writer:
        def __init__(self, *arguments: Any) -> None:
            self._lock = threading.Lock()

        def write(self, image: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
            outcome = _outcome(image, meta, settings, sizes)
            with self._lock:
                spool.add(digest_of(meta["number"]), Fetched(outcome))

        def close(self) -> None:
            return None

    return Writer


def _outcome(image: bytes | None, meta: dict[str, Any], settings: FetchSettings, sizes: dict[str, int]) -> Outcome:
    """One of its rows as one of ours."""
    if image is None:
        status, error = _status(str(meta["error_message"]))
        return Outcome(status, error)
    if settings.skip_reencode and settings.strip_metadata:
        with suppress(Refusal):
            image = stripped(image, read_header(image, settings.max_pixels)) or image
    digest = meta["sha256"]
    sizes_now = (meta["width"], meta["height"], meta["original_width"], meta["original_height"])
    return Outcome("ok", None, image, settings.encode_format, *sizes_now, sizes.get(digest), digest)


def _status(message: str) -> tuple[Status, str]:
    """The status in img2dataset's message: what our opener raised, its own words, or a decoder's."""
    word, _, reason = message.partition(": ")
    for status in FAILURES:
        if word == status:
            return status, brief(reason)  # type: ignore[return-value]  # FAILURES are statuses; a test holds them equal
    for text, named in _MESSAGES:
        if text in message:
            return named, brief(message)
    return "decode_error", brief(message)

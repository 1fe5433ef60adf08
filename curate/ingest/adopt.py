"""The `images` table of an adopted pool: where each image lies in tars that someone else wrote.

Reads the tars' headers, and an image's bytes only where the pool does not say its sha256 or its size; decodes nothing
and copies nothing, but where a set joins a crawl. Failures of the pool stay rows: img2dataset's statuses become ours,
its words stay in `error`.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any, BinaryIO

import pyarrow as pa
from PIL import Image

from curate.errors import PlanError
from curate.ingest.pools import Group, index
from curate.ingest.sources import open_plain
from curate.schema import IMAGE, IMAGE_FIELDS, IMAGES_SCHEMA, KEY, OK, TableSpec, inputs_of
from curate.stage import Read, Resources, Stage, Task
from curate.store import Store

VERSION = 1
FACTS = ("status", "error_message", "width", "height", "original_width", "original_height", "sha256")
SIZES = FACTS[2:6]
SUFFIX_NAMES = {"jpeg": "jpg"}  # as our own shards call them
IMAGES = pa.schema([field for field in IMAGES_SCHEMA if field.name != KEY.name])
COPIED = pa.schema([*IMAGE_FIELDS, pa.field(IMAGE, pa.large_binary())])

# What stands in img2dataset's error_message -> our status; the first that fits. urllib's and OpenCV's words.
MESSAGES = (
    ("x-robots-tag", "opted_out"),
    ("hash mismatch", "hash_mismatch"),
    ("http error 4", "http_4xx"),
    ("http error 5", "http_5xx"),
    ("timed out", "timeout"),
    ("name or service not known", "dns"),
    ("name resolution", "dns"),
    ("nodename nor servname", "dns"),
    ("no address associated", "dns"),
    ("getaddrinfo", "dns"),
    ("ssl", "tls"),
    ("certificate", "tls"),
    ("unknown url type", "bad_url"),
    ("no host given", "bad_url"),
    ("can't contain control characters", "bad_url"),
    ("codec can't encode", "bad_url"),
    ("nonnumeric port", "bad_url"),
    ("label", "bad_url"),  # "label empty or too long", of an international name
    ("image too small", "too_small"),
    ("aspect ratio", "bad_ratio"),
    ("decod", "decode_error"),
    ("cannot identify", "not_image"),
)


def status_of(status: str | None, message: str | None) -> str:
    """Our status for img2dataset's `status` and `error_message`."""
    if status in (None, "success"):
        return OK
    said = (message or "").lower()
    for words, ours in MESSAGES:
        if words in said:
            return ours
    return "decode_error" if status == "failed_to_resize" else "connect"


def adopt_stage(samples: TableSpec) -> "AdoptStage":
    """The stage that writes `images` for the `samples` of an adopted pool."""
    return AdoptStage(samples)


class AdoptStage(Stage):
    """Finds each row's image in the pool's tar. One shard is one tar."""

    name = "adopt"
    resources = Resources(cpus=1.0)

    def __init__(self, samples: TableSpec) -> None:
        super().__init__()
        self._samples = samples
        self.tables = (TableSpec("images", VERSION, IMAGES_SCHEMA, {"adopted": True}, inputs_of([samples])),)
        self._facts = tuple(name for name in FACTS if name in samples.columns)

    def check(self, store: Store) -> None:
        """Raises PlanError when the samples are not those of an adopted pool."""
        if "pool_tar" not in self._samples.columns:
            raise PlanError("adopt: these samples have no pool_tar; write ingest.adopt instead of ingest.sources")

    def reads(self, missing: frozenset[str]) -> Sequence[Read]:
        """Where the pool's tar is, and what the pool says of each image."""
        return [Read(self._samples, ("pool_tar", "pool_key", *self._facts))]

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        """One row for one row; see Stage."""
        return _looked_up(batches, _Tar.find, IMAGES)


class JoinedStage(Stage):
    """The `images` of a crawl with sets that are taken as they are: by `fetch`, but for shards that are a tar of
    `ingest.adopt`, whose images are copied into the pool's own tars byte for byte. No other tar is read, whatever a
    table of the crawl says."""

    def __init__(self, fetch: Stage, samples: TableSpec, tars: Sequence[str]) -> None:
        super().__init__()
        self._fetch, self._samples, self._tars = fetch, samples, frozenset(tars)
        self.name, self.tables, self.resources, self.batch_rows = (
            fetch.name,
            fetch.tables,
            fetch.resources,
            fetch.batch_rows,
        )
        self.counters = fetch.counters
        self._facts = tuple(name for name in FACTS if name in samples.columns)

    def check(self, store: Store) -> None:
        """As the fetch."""
        self._fetch.check(store)

    def reads(self, missing: frozenset[str]) -> Sequence[Read]:
        """What the fetch reads, and the places of adopted images."""
        own, *others = self._fetch.reads(missing)
        columns = dict.fromkeys((*own.columns, "pool_tar", "pool_key", *self._facts))
        return [Read(own.table, tuple(columns)), *others]

    def setup(self) -> None:
        """As the fetch."""
        self._fetch.setup()

    def teardown(self) -> None:
        """As the fetch."""
        self._fetch.teardown()

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        """See Stage.process. A shard comes of one source."""
        first = next(batches, None)
        if first is None:
            return
        whole = chain([first], batches)
        adopted = first.num_rows and first.column("pool_tar")[0].as_py() in self._tars
        yield from _looked_up(whole, _Tar.taken, COPIED) if adopted else self._fetch.process(task, whole)


def _looked_up(
    batches: Iterator[pa.RecordBatch], look: Callable[["_Tar", Mapping[str, Any]], dict[str, Any]], schema: pa.Schema
) -> Iterator[Mapping[str, pa.RecordBatch]]:
    """A row for each row, by `look` in the tar that it names; each tar is opened once."""
    with ExitStack() as stack:
        tars: dict[str, _Tar] = {}
        for batch in batches:
            rows = []
            for row in batch.to_pylist():
                if row["pool_tar"] not in tars:
                    tars[row["pool_tar"]] = _Tar(row["pool_tar"], stack)
                rows.append(look(tars[row["pool_tar"]], row))
            yield {"images": pa.RecordBatch.from_pylist(rows, schema=schema)}


def joined_stage(fetch: Stage, samples: TableSpec, tars: Sequence[str]) -> Stage:
    """`fetch` itself where no set joins the crawl. `tars`: what `ingest.adopt` lists."""
    return JoinedStage(fetch, samples, tars) if "pool_tar" in samples.columns and tars else fetch


class _Tar:
    """A pool's tar, indexed once."""

    def __init__(self, path: str, stack: ExitStack) -> None:
        self._path = path
        self._groups: dict[str, Group] = {}
        self._stream: BinaryIO | None = None
        try:
            self._stream = stack.enter_context(open_plain(path))
            self._groups, self._broken = index(self._stream)
        except OSError as error:
            self._broken = f"cannot be opened: {error}"

    def find(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The `images` row of a sample; a status where there is no image."""
        status = status_of(row.get("status"), row.get("error_message"))
        facts: dict[str, Any] = {name: row.get(name) for name in SIZES} | {"sha256": row.get("sha256")}
        if status != OK:
            return {**facts, "status": status, "error": row.get("error_message")}
        group = self._groups.get(row["pool_key"], Group())
        found = group.image()
        if found is None:
            why = self._broken or ("no image among its members" if group.members else "not in the tar")
            return {**facts, "status": "decode_error" if self._broken else "removed", "error": f"{self._path}: {why}"}
        suffix, offset, length = found
        place = {"tar": self._path, "offset": offset, "length": length, "ext": SUFFIX_NAMES.get(suffix, suffix)}
        if not (facts["sha256"] and facts["width"] and facts["height"]):
            try:
                self._look(facts, offset, length)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                told = f"{type(error).__name__}: {error}".partition(" <")[0]  # without an address in memory
                return {**facts, "status": "not_image", "error": told[:500]}
        return {**facts, **place, "status": OK, "error": None}

    def taken(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with the image's bytes instead of their place."""
        found = self.find(row)
        if found["status"] != OK:
            return {**found, IMAGE: None}
        assert self._stream is not None
        self._stream.seek(found["offset"])
        return {**found, IMAGE: self._stream.read(found["length"])}

    def _look(self, facts: dict[str, Any], offset: int, length: int) -> None:
        """Fill in what the pool does not say: the size from the image's header, the hash of the stored bytes."""
        assert self._stream is not None
        self._stream.seek(offset)
        data = self._stream.read(length)
        if not facts["sha256"]:
            facts["sha256"] = hashlib.sha256(data).hexdigest()
        with Image.open(io.BytesIO(data)) as image:
            facts["width"], facts["height"] = image.size

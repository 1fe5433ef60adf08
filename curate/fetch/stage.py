"""The fetch stage: URLs of a shard in, the `images` table and its bytes out.

Thin on purpose: it turns batches into rows, asks the downloader, and turns outcomes into batches. Rows that
`fetch.where` leaves out are not asked for: their status is `not_asked`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import pyarrow as pa

from curate.config import FetchSettings
from curate.errors import PlanError
from curate.fetch.downloader import Downloader, Row, check_settings, image_settings, load_lists
from curate.fetch.img2dataset_engine import Img2datasetDownloader
from curate.fetch.outcome import Outcome
from curate.rows import columns_of, evaluate, names_in, schema_of
from curate.schema import IMAGE, IMAGE_FIELDS, IMAGES_SCHEMA, KEY, TableSpec, inputs_of
from curate.stage import FETCHED_BYTES, Read, Resources, Stage, Task
from curate.store import Store

VERSION = 3  # of what the same bytes become; a new one fetches everything again
# What decides which images exist and how they are stored. How patiently they are asked for does not stand here: a run
# with a longer timeout goes on with what is there, and `--retry` asks for the rest.
_CONTENT = (
    "engine", "max_bytes", "robots", "opt_out", "verify_hash", "block_domains", "block_urls", "block_url_hashes",
    "block_hashes", "block_phashes", "block_phash_radius",
)  # fmt: skip


NOT_ASKED = Outcome("not_asked", "fetch.where is not true of it")


class FetchStage(Stage):
    """Downloads a shard's images: `curate.fetch.downloader` is how, `curate.config.FetchSettings` are the knobs."""

    name = "fetch"
    batch_rows = 64  # 6 MB of images: buffers of this size are used again, larger ones fetched anew from the system

    def __init__(self, settings: FetchSettings, samples: TableSpec, texts: Sequence[TableSpec] = ()) -> None:
        super().__init__()
        self._settings, self._samples = settings, samples
        chosen = settings.model_dump(mode="json", include=set(_CONTENT))
        content = {**chosen, "image": asdict(image_settings(settings))}
        self._asked: list[Read] = []
        if settings.where is not None:
            content["where"] = settings.where
            self._asked = _reads_of(settings.where, [samples, *texts], self._own_columns())
        read = {spec.name: spec for spec in (samples, *(one.table for one in self._asked))}
        spec = TableSpec("images", VERSION, IMAGES_SCHEMA, content, inputs_of(read.values()), with_images=True)
        self.tables = (spec,)
        self.resources = Resources(cpus=settings.decoders)
        self._downloader: Downloader | Img2datasetDownloader | None = None

    def check(self, store: Store) -> None:
        """Raise PlanError or ConfigError: no contact, unreadable block lists, an unknown hash column."""
        check_settings(self._settings)
        load_lists(self._settings)
        expected = self._settings.verify_hash
        if expected is not None and expected.column not in self._samples.columns:
            found = ", ".join(self._samples.columns)
            raise PlanError(f"fetch.verify_hash.column: no column {expected.column} in the sources; they have {found}")

    def reads(self, missing: frozenset[str]) -> Sequence[Read]:
        """The URL; the text, which goes into the tar beside the image; the expected hash; what `where` reads."""
        own = (name for read in self._asked if read.table is self._samples for name in read.columns)
        others = [read for read in self._asked if read.table is not self._samples]
        return [Read(self._samples, tuple(dict.fromkeys((*self._own_columns(), *own)))), *others]

    def _own_columns(self) -> list[str]:
        columns = [name for name in self._samples.columns if name in ("url", "text")]
        return columns if self._settings.verify_hash is None else [*columns, self._settings.verify_hash.column]

    def setup(self) -> None:
        """Open the client; decoders start with the first image."""
        chosen = Img2datasetDownloader if self._settings.engine == "img2dataset" else Downloader
        self._downloader = chosen(self._settings)

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        """See Stage.process. The whole shard's URLs are read first, so that each is fetched once."""
        assert self._downloader is not None
        rows = [row for batch in batches for row in self._rows(batch)]
        (spec,) = self.tables
        wanted = [row for row in rows if row is not None]
        found = self._downloader.fetch(wanted, task.scratch, spec.fingerprint, task.parts)
        outcomes = (NOT_ASKED if row is None else next(found) for row in rows)
        while part := list(islice(outcomes, self.batch_rows)):
            self.counters[FETCHED_BYTES] += sum(outcome.original_bytes or 0 for outcome in part)
            yield {spec.name: as_batch(part)}

    def _rows(self, batch: pa.RecordBatch) -> Iterator[Row | None]:
        """None for a row that is not asked for."""
        asked = [True] * batch.num_rows
        if self._settings.where is not None:
            condition = {"asked": f"CAST(({self._settings.where}) AS BOOLEAN)"}
            asked = evaluate(pa.Table.from_batches([batch]), condition)["asked"].to_pylist()
        expected = self._settings.verify_hash
        urls = batch.column("url").to_pylist()
        digests: list[Any] = [None] * len(urls) if expected is None else batch.column(expected.column).to_pylist()
        for url, digest, wanted in zip(urls, digests, asked, strict=True):
            hexed = digest.hex() if isinstance(digest, bytes) else None if digest is None else str(digest)
            yield Row(url, hexed) if wanted else None

    def teardown(self) -> None:
        """End decoders and connections."""
        if self._downloader is not None:
            self._downloader.close()
            self._downloader = None


def as_batch(outcomes: Sequence[Outcome]) -> pa.RecordBatch:
    """Outcomes as a batch of IMAGE_FIELDS and the bytes (null where there are none)."""
    columns = [pa.array([getattr(outcome, field.name) for outcome in outcomes], field.type) for field in IMAGE_FIELDS]
    images = pa.array([outcome.image if outcome.status == "ok" else None for outcome in outcomes], pa.large_binary())
    return pa.RecordBatch.from_arrays(
        [*columns, images], schema=pa.schema([*IMAGE_FIELDS, pa.field(IMAGE, pa.large_binary())])
    )


def fetch_stage(settings: FetchSettings | None, samples: TableSpec, texts: Sequence[TableSpec] = ()) -> FetchStage:
    """The stage that writes `images` for `samples`; `texts` are the tables that `fetch.where` may read besides.

    Raises PlanError for a condition that they cannot answer.
    """
    return FetchStage(settings or FetchSettings(), samples, texts)


def _reads_of(where: str, tables: Sequence[TableSpec], taken: Sequence[str]) -> list[Read]:
    """The columns that a condition reads. `taken`: the names of columns of samples that are read already."""
    columns = columns_of(tables)
    try:
        read = [columns[name] for name in names_in(where, schema_of(columns)) if name != KEY.name]
    except PlanError as error:
        raise PlanError(f"fetch.where: before the fetch there are texts and no images: {error}") from None
    for column in read:
        if column.name != column.column or (column.table is not tables[0] and column.name in taken):
            raise PlanError(
                f"fetch.where: {column.name} is a column of the sources and computed from their texts as well"
            )
    return [
        Read(spec, tuple(column.column for column in read if column.table is spec))
        for spec in tables if any(column.table is spec for column in read)
    ]  # fmt: skip

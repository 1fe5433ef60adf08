"""What a stage is, and how one shard goes through it.

A stage is a pure function from the columns it reads to the columns of the tables it writes. It knows no storage, no
engine and no recipe file: the runner below reads, calls and commits. To write one, subclass `Stage`:

    name         what people see, e.g. "fetch"
    tables       the TableSpecs it writes; each is committed on its own, and only those missing are asked for
    resources    what one worker needs
    reads()      which columns of which committed tables it needs to compute the missing ones;
                 the pseudo-column "image" of a table with tar locations gives the stored bytes (null without)
    setup()      once per worker: models, clients
    process()    batches in, per-table batches out (without `key`), in the same order, one row for one row
    teardown()   once per worker

A table declared `with_images` is given by batches that carry `image` (bytes or null) and `ext`; the runner puts the
bytes into `<shard>.tar` as img2dataset would lay them out (key.ext, key.txt, key.json) and writes tar, offset, length.

A bad sample is a value in its row. Raising means that the stage itself failed; the engine tries a shard three times,
then sets it aside, reports it and goes on.

Steps that look across shards subclass `CrossStep`.
"""

import json
import queue
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pyarrow as pa

from curate.errors import StageError
from curate.metrics import Cost, Stopwatch, Ticker
from curate.removed import FOLDER as REMOVALS
from curate.removed import Tombstones, refuse_images, tombstones_of
from curate.retry import Opened, opened
from curate.schema import IMAGE, KEY, LOCATION_FIELDS, Shard, TableSpec
from curate.scratch import Parts
from curate.store import Store
from curate.tar import TarWriter

FETCHED_BYTES = "fetched_bytes"  # the counter of a stage that downloads; progress shows it as MB/s
PREFETCHED_BATCHES = 2  # one being computed on, one ready: reading hides behind the device, memory stays flat

Item = TypeVar("Item")
Result = TypeVar("Result")
# Unordered parallel map over items, as an engine provides it to cross-shard steps.
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage needs; fractions are shares."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory_gb: float = 0.0


@dataclass(frozen=True)
class Read:
    """Columns of a committed table; `image` stands for the stored bytes."""

    table: TableSpec
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """The shard in hand: which tables are missing, and a folder for a stage's own resumption (kept until commit).

    Where the root is no local folder, `scratch` ends with the attempt, and what shall outlive it goes to `parts` too.
    """

    shard: Shard
    missing: frozenset[str]
    scratch: Path
    parts: Parts | None = None


class Stage(ABC):
    """See the module's docstring. Instances are pickled to workers before `setup`."""

    name: str
    tables: tuple[TableSpec, ...]
    resources: Resources = Resources()
    batch_rows: int = 256  # 25 MB of 100 kB images in flight per batch

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()  # whatever a stage wants counted; cleared for each shard

    @abstractmethod
    def reads(self, missing: frozenset[str]) -> Sequence[Read]:
        """What must be read to compute these tables."""

    def check(self, store: Store) -> None:  # noqa: B027  # most stages have nothing to check
        """Raise PlanError, before any worker starts, for what would fail later (weights, settings)."""

    def setup(self) -> None:  # noqa: B027
        """Load models, open clients; on the worker."""

    @abstractmethod
    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        """Compute the missing tables. Every row of every batch must come out once, in order, in each table."""

    def teardown(self) -> None:  # noqa: B027
        """Close what `setup` opened."""


class CrossStep(ABC):
    """A step that looks across shards and scatters back tables aligned with them (or publishes a release)."""

    name: str
    tables: tuple[TableSpec, ...] = ()
    note: str = ""  # what a plan says of it besides: a setting that this machine's limits changed

    def check(self, store: Store) -> None:  # noqa: B027
        """Raise PlanError for what would fail later."""

    @abstractmethod
    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether everything it would write is there."""

    @abstractmethod
    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Do what is missing; returns counts for the funnel."""


@dataclass(frozen=True)
class ShardReport:
    """What happened to a shard in a stage."""

    stage: str
    shard: str
    rows: int
    computed: tuple[str, ...] = ()  # tables; empty when nothing was missing
    counts: Mapping[str, int] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    set_aside: str | None = None  # why, when three tries failed


def missing_tables(store: Store, stage: Stage, shard: str) -> frozenset[str]:
    """Names of the stage's tables that this shard still lacks."""
    return frozenset(spec.name for spec in stage.tables if not store.has(spec, shard))


def scratch_path(store: Store, stage: Stage, shard: str) -> str:
    """Where a stage keeps what it needs to resume inside a shard, below the root."""
    return f"_scratch/{stage.name}/{stage.tables[0].fingerprint}/{shard}"


def run_shard(store: Store, stage: Stage, shard: Shard) -> ShardReport:
    """Compute and commit what a shard lacks. Raises whatever the stage raises; then nothing was committed."""
    missing = missing_tables(store, stage, shard.name)
    if not missing:
        return ShardReport(stage.name, shard.name, shard.rows)
    stage.counters.clear()
    removals = store.names(REMOVALS)
    with Stopwatch() as watch, ExitStack() as stack:
        reads = stage.reads(missing)
        table = _read(store, reads, shard.name)
        kept = scratch_path(store, stage, shard.name)
        scratch, left = Path(store.full(kept)), None
        if not store.is_local:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="curate-scratch-")))
            left = stack.enter_context(Parts(store, kept))
        wanted = [spec for spec in stage.tables if spec.name in missing]
        tars = [spec for spec in wanted if spec.with_images]
        again = opened(store, tars[0], shard) if tars else None
        writers = {spec.name: _open_writer(store, spec, shard, table, again, stack) for spec in tars}
        parts: dict[str, list[pa.RecordBatch]] = {spec.name: [] for spec in wanted}
        todo = table if again is None else table.filter(again.mask)
        source = _prefetch(_batches(store, reads, todo, stage.batch_rows), stack)
        produced = stage.process(Task(shard, missing, scratch, left), source)
        for outputs in produced if again is None else again.merge(produced, stage.batch_rows):
            for name, batch in outputs.items():
                if name in parts:
                    parts[name].append(writers[name].add(batch) if name in writers else batch)
        for writer in writers.values():
            writer.finish()
        tables = {spec.name: _assemble(spec, table, parts[spec.name], stage, shard) for spec in wanted}
        counts = Counter(stage.counters)
        for result in tables.values():
            if "status" in result.column_names:
                counts.update(result.column("status").to_pylist())
        if store.names(REMOVALS) != removals:  # this worker outlived its run, and a removal came after it
            raise StageError(f"{stage.name}: samples were removed while {shard.name} was in work; it is done again")
    # The tars are committed now; the Parquet file, which says that the shard is done, comes after.
    for spec in wanted:
        store.write(spec, shard, tables[spec.name], aligned_with=reads[0].table)
    if again is not None:
        again.close()
    return ShardReport(stage.name, shard.name, shard.rows, tuple(sorted(missing)), dict(counts), watch.cost)


def _read(store: Store, reads: Sequence[Read], shard: str) -> pa.Table:
    columns: list[tuple[TableSpec, list[str]]] = []
    for read in reads:
        names = [name for name in read.columns if name != IMAGE]
        if IMAGE in read.columns:
            names += [field.name for field in LOCATION_FIELDS if field.name not in names]
        columns.append((read.table, names))
    return store.read_joined(columns, shard)


def _batches(store: Store, reads: Sequence[Read], table: pa.Table, rows: int) -> Iterator[pa.RecordBatch]:
    with_image = any(IMAGE in read.columns for read in reads)
    for start in range(0, table.num_rows, rows):
        piece = table.slice(start, rows).combine_chunks()
        if with_image:
            piece = piece.append_column(IMAGE, pa.array(store.read_images(piece), pa.large_binary()))
        yield pa.RecordBatch.from_arrays([column.combine_chunks() for column in piece.columns], schema=piece.schema)


def _prefetch(source: Iterator[pa.RecordBatch], stack: ExitStack) -> Iterator[pa.RecordBatch]:
    """Read ahead in a thread; an error there is raised where the batch would have come."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=PREFETCHED_BATCHES)
    stop = threading.Event()

    def offer(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((kind, value), timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def pump() -> None:
        try:
            for batch in source:
                if not offer("batch", batch):
                    return
            offer("end", None)
        except BaseException as error:  # handed to the consumer, who raises it
            offer("error", error)

    thread = threading.Thread(target=pump, name="curate-prefetch", daemon=True)
    stack.callback(thread.join)
    stack.callback(stop.set)
    thread.start()

    def drain() -> Iterator[pa.RecordBatch]:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value

    return drain()


def _assemble(
    spec: TableSpec, source: pa.Table, parts: Iterable[pa.RecordBatch], stage: Stage, shard: Shard
) -> pa.Table:
    names = spec.columns
    parts = list(parts)
    rows = sum(part.num_rows for part in parts)
    if rows != source.num_rows:
        raise StageError(f"{stage.name} gave {rows} rows of {spec.name} for the {source.num_rows} of {shard.name}")
    keys = source.column(KEY.name)
    arrays = [pa.chunked_array([part.column(name) for part in parts], spec.schema.field(name).type) for name in names]
    return pa.table([keys, *arrays], schema=pa.schema([KEY, *(spec.schema.field(name) for name in names)]))


class _ImageWriter:
    """Puts a table's image bytes into the shard's tar and replaces them by their place."""

    def __init__(self, tar: TarWriter, path: str, source: pa.Table, removed: Tombstones) -> None:
        self._tar, self._path, self._row, self._removed = tar, path, 0, removed
        self._keys = source.column(KEY.name).to_pylist()
        self._side = {name: source.column(name).to_pylist() for name in ("url", "text") if name in source.column_names}

    def add(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        offsets: list[int | None] = []
        lengths: list[int | None] = []
        batch = refuse_images(batch, self._removed)
        facts = batch.drop_columns([IMAGE]).to_pylist()
        for image, fact in zip(batch.column(IMAGE), facts, strict=True):
            data = image.as_py()
            offsets.append(None if data is None else self._member(data, fact))
            lengths.append(None if data is None else len(data))
            self._row += 1
        tars = [None if offset is None else self._path for offset in offsets]
        located = zip(LOCATION_FIELDS, (tars, offsets, lengths), strict=True)
        batch = batch.drop_columns([IMAGE])
        for place, values in located:
            batch = batch.append_column(place, pa.array(values, place.type))
        return batch

    def _member(self, data: bytes, fact: Mapping[str, Any]) -> int:
        key = self._keys[self._row]
        side = {name: values[self._row] for name, values in self._side.items()}
        offset = self._tar.add(f"{key}.{fact['ext']}", data)
        if side.get("text") is not None:
            self._tar.add(f"{key}.txt", side["text"].encode("utf-8", "replace"))
        record = {"key": key, **side, **fact}
        self._tar.add(f"{key}.json", json.dumps(record, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace"))
        return offset

    def finish(self) -> None:
        self._tar.finish()


def _open_writer(
    store: Store, spec: TableSpec, shard: Shard, source: pa.Table, again: Opened | None, stack: ExitStack
) -> _ImageWriter:
    path = store.shard_path(spec, shard.name, again.tar_suffix if again else ".tar")
    local = stack.enter_context(store.staged(path))
    stream = stack.enter_context(local.open("wb"))
    return _ImageWriter(TarWriter(stream), path, source, tombstones_of(store))

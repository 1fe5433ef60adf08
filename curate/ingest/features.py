"""Features that come with a table, as embeddings: DataComp's `.npz` beside each metadata Parquet file.

Row i of an array belongs to row i of the table of the same name. A shard's rows are found again in their table by key,
so pruned and repeated rows do no harm. Only the rows in question are read from an array that is stored uncompressed
(numpy's `savez`); a compressed one is read through from its start. A missing file or array is refused, not skipped.
"""

import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from curate.config import IngestSettings
from curate.errors import PlanError, SourceError
from curate.ingest.keys import hash_rows, hex_keys
from curate.ingest.passes import identity_columns, kept_rows, url_and_text
from curate.ingest.pools import find_pools
from curate.ingest.reading import look
from curate.ingest.sources import File, Source, find_tables, open_plain
from curate.schema import KEY, TableSpec, inputs_of
from curate.stage import Read, Resources, Stage, Task
from curate.store import Store

VERSION = 1
ROWS_AT_ONCE = 4_096  # 6 MB of 768 float16


def adopt_features_stage(settings: IngestSettings, store: Store, samples: TableSpec) -> "FeaturesStage":
    """The stage that writes `ingest.features`: each named table, from the array of the same row of its source's .npz.

    The width of an array is read from the first source's .npz. Raises PlanError, SourceError.
    """
    batches = store.batches(samples)
    files = {
        f"{number:04d}-{place:05d}": source["path"]
        for number, batch in enumerate(batches)
        for place, source in enumerate(batch["sources"])
    }
    wrong = [name for name in settings.features if not name.startswith("embeddings_")]
    if wrong:
        raise PlanError(f"ingest.features: {', '.join(wrong)}: these tables are called embeddings_<name>")
    first = next(iter(files.values()), None) or _first(settings)  # nothing is in the pool when a first run is planned
    return FeaturesStage(dict(settings.features), dict(settings.columns), samples, files, first)


def _first(settings: IngestSettings) -> str:
    return (find_pools(settings.adopt) if settings.adopt else find_tables(settings.sources))[0].path


class FeaturesStage(Stage):
    """Takes rows of arrays to the shards of their samples, as float16 lists of fixed size, as they are in the file."""

    name = "features"
    resources = Resources(cpus=1.0)
    batch_rows = ROWS_AT_ONCE

    def __init__(
        self,
        arrays: Mapping[str, str],
        columns: Mapping[str, str],
        samples: TableSpec,
        files: Mapping[str, str],
        first: str,
    ) -> None:
        super().__init__()
        self._arrays, self._columns, self._samples, self._files = arrays, columns, samples, files
        self.tables = tuple(
            TableSpec(
                table, VERSION,
                pa.schema([KEY, (_column(table, array), pa.list_(pa.float16(), _width(first, array)))]),
                {"array": array}, inputs_of([samples]),
            )
            for table, array in arrays.items()
        )  # fmt: skip

    def reads(self, missing: frozenset[str]) -> Sequence[Read]:
        """The keys."""
        return [Read(self._samples, (KEY.name,))]

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        """One row for one row; see Stage. Raises SourceError when a table changed or has no .npz."""
        table = self._files[task.shard.name.rpartition("-")[0]]
        source = look(File(table, 0, "", _kind(table)), self._columns)
        held = [batch.column(KEY.name) for batch in batches]
        rows = _rows_of(source, pa.chunked_array(held).to_pylist(), table)
        specs = [spec for spec in self.tables if spec.name in task.missing]
        with open_npz(table) as (stream, archive):
            arrays = {spec.name: find_array(archive, stream, self._arrays[spec.name], table) for spec in specs}
            at = 0
            for keys in held:
                wanted = rows[at : at + len(keys)]
                at += len(keys)
                yield {
                    spec.name: pa.RecordBatch.from_arrays(
                        [_lists(arrays[spec.name].read(wanted), spec.schema.field(1).type)], [spec.schema.names[1]]
                    )
                    for spec in specs
                }


def _column(table: str, array: str) -> str:
    """As scorers name them: <name>_image, and <name>_text for arrays like l14_txt."""
    return f"{table.removeprefix('embeddings_')}_{'text' if array.endswith(('txt', 'text')) else 'image'}"


def _kind(path: str) -> str:
    return "pool" if path.endswith(".tar") else "parquet"


def beside(table: str) -> str:
    """The .npz of a Parquet file or a tar."""
    return f"{table.rpartition('.')[0]}.npz"


@contextmanager
def open_npz(table: str) -> Iterator[tuple[BinaryIO, zipfile.ZipFile]]:
    """The .npz beside a table. Raises SourceError when it is not there or is none."""
    try:
        with open_plain(beside(table)) as stream, zipfile.ZipFile(stream) as archive:
            yield stream, archive
    except (FileNotFoundError, zipfile.BadZipFile) as error:
        raise SourceError(f"{beside(table)}: ingest.features wants it beside the table: {error}") from None


def _rows_of(source: Source, keys: Sequence[str], table: str) -> list[int]:
    """The row of the table that each key stands for: the first that has it."""
    wanted = set(keys)
    places: dict[str, int] = {}
    at = 0
    for rows in kept_rows(source, identity_columns(source), None, Counter()):
        found = hex_keys(hash_rows(*url_and_text(rows, source))).to_pylist()
        for place, key in enumerate(found, start=at):
            if key in wanted:
                places.setdefault(key, place)
        at += len(found)
        if len(places) == len(wanted):
            break
    if len(places) < len(wanted):
        raise SourceError(f"{table}: {len(wanted) - len(places)} samples are not in it any more; it was replaced")
    return [places[key] for key in keys]


def _lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    if values.shape[1] != kind.list_size:
        raise SourceError(f"features of {values.shape[1]} numbers; {kind.list_size} expected, as in the first file")
    return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float16).reshape(-1)), kind.list_size)


def _width(table: str, name: str) -> int:
    with open_npz(table) as (stream, archive):
        return find_array(archive, stream, name, table).width


@dataclass
class StoredArray:
    """A two-dimensional array of an .npz, read by rows that ascend."""

    archive: zipfile.ZipFile
    member: zipfile.ZipInfo
    stream: BinaryIO
    start: int | None  # byte of the first row in the file; None: compressed
    rows: int
    width: int
    kind: np.dtype

    def read(self, wanted: Sequence[int]) -> np.ndarray:
        """These rows, (len(wanted), width)."""
        low, high = min(wanted), max(wanted) + 1
        if high > self.rows:
            raise SourceError(f"{self.member.filename}: row {high - 1} wanted, it has {self.rows}")
        rows: np.ndarray = self._span(low, high)[np.array(wanted) - low]
        return rows

    def _span(self, low: int, high: int) -> np.ndarray:
        size = self.width * self.kind.itemsize
        if self.start is not None:
            self.stream.seek(self.start + low * size)
            data = self.stream.read((high - low) * size)
        else:
            with self.archive.open(self.member) as packed:
                _header(packed)
                left = low * size
                while left:
                    left -= len(packed.read(min(left, 2**22)))
                data = packed.read((high - low) * size)
        return np.frombuffer(data, self.kind).reshape(high - low, self.width)


def _header(stream: object) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)  # type: ignore[arg-type]
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, kind = reader(stream)  # type: ignore[arg-type]
    return tuple(shape), by_column, kind


def find_array(archive: zipfile.ZipFile, stream: BinaryIO, name: str, table: str) -> StoredArray:
    """An array of an open .npz. Raises SourceError when it is not there, or no table of floats in C order."""
    try:
        member = archive.getinfo(f"{name}.npy")
    except KeyError:
        held = ", ".join(entry.removesuffix(".npy") for entry in archive.namelist())
        raise SourceError(f"{beside(table)}: no array {name}; it has {held}") from None
    with archive.open(member) as packed:
        shape, by_column, kind = _header(packed)
        header = packed.tell()
    if len(shape) != 2 or by_column or kind.kind != "f":
        raise SourceError(f"{beside(table)}: {name} is {kind} {shape}; expected rows of floats in C order")
    start = None
    if member.compress_type == zipfile.ZIP_STORED:
        stream.seek(member.header_offset + 26)  # of the local header: lengths of the name and of the extra field
        lengths = stream.read(4)
        named, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
        start = member.header_offset + 30 + named + extra + header
    return StoredArray(archive, member, stream, start, shape[0], shape[1], kind)

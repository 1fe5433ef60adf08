"""A source's rows as Arrow batches under its own column names and types, whatever it is made of.

Lines that cannot be read are counted (`bad_lines`), and so are values that do not fit their column's type
(`bad_values`, read as null); nothing disappears silently. Types of CSV, TSV and JSONL are inferred from the file's
beginning. Refuses nothing that a row contains: URLs that are null, empty or not strings are the fetcher's business.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from curate.errors import SourceError
from curate.ingest import delimited, jsonlines, pools
from curate.ingest.schemas import headerless, recognise
from curate.ingest.sources import File, Source, open_unpacked, parquet_batches, parquet_rows, parquet_schema

BATCH_ROWS = 32_768  # 10 MB of web URLs and captions; larger ones were not faster in bench_ingest
LINE_BYTES = 150  # of a text table, to estimate its rows: URL, caption and a few numbers
UNPACKED_TIMES = 4  # what gzip makes of such lines


def look(file: File, columns: Mapping[str, str]) -> Source:
    """A source's columns and their meaning. Raises SourceError."""
    if file.kind == "pool":
        schema = pools.schema(file.path)
        return Source(file, pools.layout(file.path, schema, columns), schema)
    if file.kind == "parquet":
        schema = _plain(parquet_schema(file.path))
        return Source(file, recognise(file.path, schema.names, columns), schema)
    with open_unpacked(file.path) as stream:
        head = stream.read(delimited.LOOK_BYTES)
    if file.kind == "jsonl":
        schema = jsonlines.infer(file.path, head)
        return Source(file, recognise(file.path, schema.names, columns), schema)
    header, schema, first = delimited.infer(file.path, head, file.kind)
    layout = recognise(file.path, schema.names, columns) if header else headerless(file.path, first, columns)
    return Source(file, layout, schema, header)


def _plain(schema: pa.Schema) -> pa.Schema:
    """Without dictionaries and views, which are how a file stores a type and not the type."""
    return pa.schema([pa.field(field.name, plain_type(field.type)) for field in schema])


def plain_type(kind: pa.DataType) -> pa.DataType:
    """A type as `samples` stores it."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def rows_about(source: Source) -> int:
    """How many rows a source has: exact where it says so, an estimate for text."""
    if source.file.kind == "parquet":
        return parquet_rows(source.file.path)
    if source.file.kind == "pool":
        return pools.rows_about(source.file.path)
    packed = source.file.path.lower().endswith((".gz", ".bz2", ".xz", ".zst"))
    return 1 + source.file.bytes * (UNPACKED_TIMES if packed else 1) // LINE_BYTES


def read_batches(source: Source, names: Sequence[str], counts: Counter[str]) -> Iterator[pa.RecordBatch]:
    """The named columns of a source in batches, in its order; contents that the layout swaps are swapped.

    Raises SourceError when it cannot be read on.
    """
    swap = source.layout.swap
    other = dict([swap, swap[::-1]]) if swap else {}
    fields = [source.schema.field(other.get(name, name)) for name in names]
    try:
        for batch in _raw(source, [field.name for field in fields], counts):
            columns = [fit(batch.column(field.name), field.type, counts) for field in fields]
            yield pa.RecordBatch.from_arrays(columns, list(names))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError, EOFError) as error:
        raise SourceError(f"{source.file.path}: cannot be read: {type(error).__name__}: {error}") from error


def _raw(source: Source, names: Sequence[str], counts: Counter[str]) -> Iterator[pa.RecordBatch]:
    path = source.file.path
    if source.file.kind == "parquet":
        yield from parquet_batches(path, names, BATCH_ROWS)
    elif source.file.kind == "pool":
        yield from pools.batches(path, names, BATCH_ROWS)
    else:
        with open_unpacked(path) as stream:
            if source.file.kind == "jsonl":
                yield from jsonlines.batches(stream, names, BATCH_ROWS, counts)
            else:
                yield from delimited.batches(stream, source.file.kind, source.schema.names, source.header, counts)


def fit(values: pa.Array, kind: pa.DataType, counts: Counter[str]) -> pa.Array:
    """Values as another type; those that do not fit become null and are counted as `bad_values`."""
    if values.type == kind:
        return values
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        return values.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        fitted = [_fit_one(value, kind) for value in values]
    result = pa.array(fitted, kind)
    counts["bad_values"] += result.null_count - values.null_count
    return result


def _fit_one(value: pa.Scalar, kind: pa.DataType) -> object:
    try:
        return value.cast(kind).as_py()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        if pa.types.is_string(kind) and pa.types.is_binary(value.type):
            return value.as_py().decode("utf-8", "replace")
        return None


def web_address(values: pa.Array) -> pa.Array:
    """The `url` column: strings; null for what is empty or no string."""
    if not pa.types.is_string(values.type):
        return pa.nulls(len(values), pa.string())
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(values), ""), pa.scalar(None, pa.string()), values)

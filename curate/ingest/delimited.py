"""CSV and TSV as they are found: quotes that never close, rows with too few fields, bytes that are not UTF-8.

A block of lines goes through Arrow's reader; where that meets anything odd, the block is read again line by line, so
that a broken line costs itself and not its neighbours. What still cannot be read is counted as `bad_lines`. A quoted
value may hold up to `LINES_PER_VALUE` lines. TSV without a header (CC3M, CC12M) has no quoting at all.
"""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv as pa_csv

from curate.errors import SourceError
from curate.ingest.schemas import looks_like_url

LOOK_BYTES = 2**20  # of a text table, to infer its columns: some 5,000 rows
BLOCK_BYTES = 4 * 2**20
LINE_BYTES = 16 * 2**20  # a longer line is cut, and then it is a bad one
LINES_PER_VALUE = 20
DELIMITERS = {"csv": ",", "tsv": "\t"}
MARK = b"\xef\xbb\xbf"  # what Excel puts before UTF-8


def infer(path: str, head: bytes, kind: str) -> tuple[bool, pa.Schema, list[list[str]]]:
    """(whether there is a header, columns and types, first rows) from a file's beginning.

    Without a header the columns are "0", "1", …; a first line that holds a web address is no header.
    Raises SourceError for an empty file and for two columns of one name.
    """
    lines = head.removeprefix(MARK).decode("utf-8", "replace").splitlines()
    if len(head) == LOOK_BYTES and len(lines) > 1:
        lines = lines[:-1]
    if not lines:
        raise SourceError(f"{path}: empty; expected a table of URLs")
    first = _split(lines[0], DELIMITERS[kind], quoted=True)
    header = not any(looks_like_url(value) for value in first)
    names = first if header else [str(place) for place in range(len(first))]
    if len(set(names)) < len(names):
        raise SourceError(f"{path}: two columns have the same name in its header: {', '.join(names)}")
    rows, _ = _recover(
        lines[1:] if header else lines, DELIMITERS[kind], header or kind == "csv", len(names), True, Counter()
    )
    kinds = [_type([row[place] for row in rows]) for place in range(len(names))]
    return header, pa.schema(list(zip(names, kinds, strict=True))), rows


def _type(values: Sequence[str]) -> pa.DataType:
    """int64, float64 or string: the narrowest that all values fit which are not empty."""
    texts = pa.array([value or None for value in values], pa.string())
    for kind in (pa.int64(), pa.float64()):
        if texts.null_count < len(texts):
            try:
                texts.cast(kind)
            except pa.ArrowInvalid:
                continue
            return kind
    return pa.string()


def batches(
    stream: BinaryIO, kind: str, names: Sequence[str], header: bool, counts: Counter[str]
) -> Iterator[pa.RecordBatch]:
    """All columns as strings, empty ones null; bad lines are counted."""
    quoted = header or kind == "csv"
    if stream.read(len(MARK)) != MARK:
        stream.seek(0)
    if header:
        stream.readline(LINE_BYTES)
    carried = b""
    while True:
        block = stream.read(BLOCK_BYTES)
        last = len(block) < BLOCK_BYTES
        block = carried + block + (b"" if last else stream.readline(LINE_BYTES))
        carried = b""
        if block.strip():
            batch = _fast(block, DELIMITERS[kind], quoted, names)
            if batch is None:
                lines = _text(block, counts).split("\n")
                rows, left = _recover(lines, DELIMITERS[kind], quoted, len(names), last, counts)
                carried = left.encode()
                columns = [pa.array([row[place] or None for row in rows], pa.string()) for place in range(len(names))]
                batch = pa.RecordBatch.from_arrays(columns, list(names))
            yield _decoded(batch, counts)
        if last:
            return


def _fast(block: bytes, delimiter: str, quoted: bool, names: Sequence[str]) -> pa.RecordBatch | None:
    """A block by Arrow's reader; None when anything in it is odd."""
    if quoted and block.count(b'"') % 2:
        return None
    odd: list[str] = []

    def refuse(row: pa_csv.InvalidRow) -> str:
        odd.append(row.text or "")
        return "skip"

    try:
        table = pa_csv.read_csv(
            pa.BufferReader(block),
            pa_csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=list(names)),
            pa_csv.ParseOptions(
                delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted,
                invalid_row_handler=refuse,
            ),
            pa_csv.ConvertOptions(
                column_types={name: pa.binary() for name in names}, null_values=[""], strings_can_be_null=True,
            ),
        )  # fmt: skip
    except pa.ArrowInvalid:
        return None
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    if odd or table.num_rows != lines:  # a value that swallowed lines: perhaps rightly
        return None
    return pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], list(names))


def _decoded(batch: pa.RecordBatch, counts: Counter[str]) -> pa.RecordBatch:
    columns = []
    for column in batch.columns:
        try:
            columns.append(column.cast(pa.string()))
        except pa.ArrowInvalid:
            counts["bad_encoding"] += 1
            texts = [None if value is None else value.decode("utf-8", "replace") for value in column.to_pylist()]
            columns.append(pa.array(texts, pa.string()))
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _text(block: bytes, counts: Counter[str]) -> str:
    try:
        return block.decode()
    except UnicodeDecodeError:
        counts["bad_encoding"] += 1
        return block.decode("utf-8", "replace")


def _recover(
    lines: Sequence[str], delimiter: str, quoted: bool, width: int, last: bool, counts: Counter[str]
) -> tuple[list[list[str]], str]:
    """Rows of `width` fields, line by line; and the text of a value that may end in the next block."""
    rows: list[list[str]] = []
    at = 0
    while at < len(lines):
        line = lines[at].rstrip("\r")
        taken = 1
        row = _split(line, delimiter, quoted)
        if quoted and _is_open(line, delimiter):
            row, taken = _joined(lines[at : at + LINES_PER_VALUE], delimiter, width)
            if not row and not last and len(lines) - at < LINES_PER_VALUE:
                return rows, "\n".join(lines[at:])
            row = row or line.split(delimiter)
        if len(row) == width:
            rows.append(row)
        elif line.strip():
            counts["bad_lines"] += 1
        at += taken
    return rows, ""


def _split(line: str, delimiter: str, quoted: bool) -> list[str]:
    if not quoted:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def _is_open(text: str, delimiter: str) -> bool:
    """Whether a quoted value has not ended."""
    try:
        list(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def _joined(lines: Sequence[str], delimiter: str, width: int) -> tuple[list[str], int]:
    """The row that the first line begins and a later one ends; no fields when there is none."""
    text = lines[0]
    for more, line in enumerate(lines[1:], start=2):
        text += "\n" + line
        try:
            parsed = list(csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True))
        except csv.Error:
            continue
        if len(parsed) == 1 and len(parsed[0]) == width:
            return parsed[0], more
    return [], 1

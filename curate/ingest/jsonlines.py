"""JSONL tables: one object a line, each parsed alone, so that a broken line costs one line and is counted.

Arrow's reader would end the file at the first value of another type; these files are written by hand-made scripts.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa

from curate.errors import SourceError


def infer(path: str, head: bytes) -> pa.Schema:
    """Columns and types from a file's beginning. Raises SourceError when no line of it is an object."""
    lines = head.split(b"\n")
    rows = [row for row in map(_parse, lines[:-1] if len(lines) > 1 else lines) if row is not None]
    if not rows:
        raise SourceError(f"{path}: no JSON object in its first lines; expected one per line")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.schema([(name, _type([row.get(name) for row in rows])) for name in names])


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _type(values: Sequence[Any]) -> pa.DataType:
    kinds = {type(value) for value in values if value is not None}
    if not kinds or str in kinds:
        return pa.string()
    if kinds == {bool}:
        return pa.bool_()
    if kinds <= {int, float}:
        return pa.float64() if float in kinds else pa.int64()
    try:
        return pa.array(values).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string()


def batches(stream: BinaryIO, names: Sequence[str], rows: int, counts: Counter[str]) -> Iterator[pa.RecordBatch]:
    """Batches of the named columns, each of the type that its values have; bad lines are counted."""
    held: list[dict[str, Any]] = []
    for line in stream:
        row = _parse(line)
        if row is not None:
            held.append(row)
        elif line.strip():
            counts["bad_lines"] += 1
        if len(held) == rows:
            yield _batch(held, names, counts)
            held = []
    if held:
        yield _batch(held, names, counts)


def _batch(rows: Sequence[dict[str, Any]], names: Sequence[str], counts: Counter[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([_column([row.get(name) for row in rows], counts) for name in names], list(names))


def _column(values: Sequence[Any], counts: Counter[str]) -> pa.Array:
    kind = _type(values)
    if not pa.types.is_string(kind):
        try:
            return pa.array(values, kind)
        except (OverflowError, pa.ArrowInvalid, pa.ArrowTypeError):  # an integer beyond 64 bits, for one
            pass
    texts = [value if isinstance(value, str) or value is None else _as_text(value) for value in values]
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:  # half of a surrogate pair: valid JSON, no text
        counts["bad_encoding"] += 1
        return pa.array([None if text is None else text.encode("utf-8", "replace").decode() for text in texts])


def _as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

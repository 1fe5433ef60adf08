"""What a scorer gives, as Arrow columns: no NaN leaves, and rows that have no value are null.

Pure: values in, arrays out. Refuses a value count that is not the row count.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.errors import StageError
from curate.score.scorer import Values


def to_arrow(field: pa.Field, values: Values, rows: int) -> tuple[pa.Array, int]:
    """`values` as an array of the field's type, and how many of them were NaN or infinite (they become null).

    Raises StageError when there are not `rows` values.
    """
    if len(values) != rows:
        raise StageError(f"{field.name}: {len(values)} values for {rows} rows")
    if pa.types.is_fixed_size_list(field.type):
        return _vectors(field.type, values)
    if pa.types.is_floating(field.type):
        plain = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        absent = np.array([value is None for value in values], dtype=bool)
        with np.errstate(over="ignore"):
            narrow = plain.astype(field.type.to_pandas_dtype())
        finite = np.isfinite(narrow)
        return pa.array(narrow, field.type, mask=~finite), int((~finite & ~absent).sum())
    plain_values = values.tolist() if isinstance(values, np.ndarray) else list(values)
    return pa.array(plain_values, field.type), 0


def _vectors(kind: pa.FixedSizeListType, values: Values) -> tuple[pa.Array, int]:
    """float [N, d], or a sequence whose absent rows are None."""
    width = kind.list_size
    absent = np.array([value is None for value in values], dtype=bool)
    dense = np.zeros((len(values), width), dtype=np.float16)
    given = np.flatnonzero(~absent)
    if len(given):
        with np.errstate(over="ignore"):
            rows = values[given] if isinstance(values, np.ndarray) else np.stack([values[int(row)] for row in given])
            dense[given] = rows.astype(np.float16)
    finite = np.isfinite(dense).all(axis=1)
    flat = pa.array(dense.reshape(-1), kind.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=pa.array(absent | ~finite)), int((~finite).sum())


def vectors_of(column: pa.Array) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
    """A fixed-size list column as float16 [N, d] and bool [N], which rows hold a vector."""
    width = column.type.list_size
    flat = column.values.slice(column.offset * width, len(column) * width).to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), width), column.is_valid().to_numpy(zero_copy_only=False)


def scatter(array: pa.Array, at: Sequence[int], rows: int) -> pa.Array:
    """`array[i]` in row `at[i]` of `rows`; null elsewhere."""
    places = np.full(rows, -1, dtype=np.int64)
    places[np.asarray(at, dtype=np.int64)] = np.arange(len(at))
    return array.take(pa.array(places, mask=places < 0))

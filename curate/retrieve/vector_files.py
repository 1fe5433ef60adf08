"""Vectors that a recipe brings along: .npy, .npz and Parquet, here or behind any fsspec URL.

    .npy       a matrix [n, d]
    .npz       its array `array`, or its only one
    Parquet    its column `array`, or its only column of lists

A local .npy is read in pieces without reading the rest; so are Parquet's row groups. It refuses pickles, ragged rows
and whatever is not a matrix of numbers.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from tokenize import TokenError
from typing import Any, BinaryIO, cast
from zipfile import BadZipFile, ZipFile, is_zipfile

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from curate.errors import PlanError

WINDOWS, WINDOW_BYTES = 64, 1 << 20  # a file below 64 MB is hashed whole, a larger one at 64 places and by its size


def digest_of(path: str, place: str) -> str:
    """What names the file's content. Raises PlanError when it cannot be read; `place` starts the text."""
    try:
        with _open(path) as handle:
            size = handle.seek(0, 2)
            digest = hashlib.sha256(str(size).encode())
            step = max(WINDOW_BYTES, (size - WINDOW_BYTES) // (WINDOWS - 1))
            for at in range(0, size, step):
                handle.seek(at)
                digest.update(handle.read(WINDOW_BYTES))
    except (OSError, ValueError, ImportError) as error:
        raise PlanError(f"{place}: {path} cannot be read: {error}") from None
    return digest.hexdigest()


def length_of(path: str, array: str | None) -> int:
    """How many vectors a file holds. Raises PlanError when it is none of the three."""
    if path.endswith(".parquet"):
        with _parquet_file(path) as file:
            _column(path, array, file)
            return int(file.metadata.num_rows)
    return len(_matrix(path, array))


def check_width(width: int, expected: int, path: str, place: str) -> None:
    """Raise PlanError for vectors of another width than the pool's; `width` 0 is not known. `place` starts the text."""
    if width not in (0, expected):
        raise PlanError(f"{place}: {path} has {width} numbers a vector, the pool {expected}; embed both by one model")


def width_of(path: str, array: str | None) -> int:
    """Numbers in a vector; 0 where a file does not say so before its rows are read."""
    if path.endswith(".parquet"):
        with _parquet_file(path) as file:
            kind = file.schema_arrow.field(_column(path, array, file)).type
            return int(kind.list_size) if pa.types.is_fixed_size_list(kind) else 0
    if _is_mapped(path):
        return int(_matrix(path, array).shape[1])
    try:
        with _open(path) as handle:
            if not is_zipfile(handle):
                return 0
            with ZipFile(handle) as archive:  # its names alone: an array is read with its rows
                names = [name.removesuffix(".npy") for name in archive.namelist()]
    except BadZipFile as error:
        raise PlanError(f"{path}: neither .npy nor .npz of numbers: {error}") from None
    _chosen(path, array, names)
    return 0


def read_span(path: str, array: str | None, start: int, stop: int) -> npt.NDArray[Any]:
    """Vectors `start` to `stop` of a file, [stop - start, d]; a null of Parquet is a row of NaN."""
    if path.endswith(".parquet"):
        return _parquet(path, array, start, stop)
    part = _matrix(path, array)[start:stop]
    return np.array(part, dtype=part.dtype.newbyteorder("="))


@lru_cache(maxsize=1)  # pieces of one file are read one after the other
def _matrix(path: str, array: str | None) -> npt.NDArray[Any]:
    try:
        if _is_mapped(path):
            held = np.load(fsspec.core.url_to_fs(path)[1], mmap_mode="r", allow_pickle=False)
        else:
            with _open(path) as handle:
                held = np.load(handle, allow_pickle=False)
                if not isinstance(held, np.ndarray):
                    held = held[_chosen(path, array, held.files)]
    except (ValueError, EOFError, BadZipFile, TokenError, SyntaxError) as error:
        raise PlanError(f"{path}: neither .npy nor .npz of numbers: {error}") from None
    if held.ndim != 2 or not np.issubdtype(held.dtype, np.floating):
        raise PlanError(f"{path}: a matrix of floats is expected, found {held.dtype}{list(held.shape)}")
    return cast(npt.NDArray[Any], held)


def _is_mapped(path: str) -> bool:
    """A local .npy, whose rows are read as they are asked for."""
    return path.endswith(".npy") and isinstance(fsspec.core.url_to_fs(path)[0], LocalFileSystem)


def _parquet(path: str, array: str | None, start: int, stop: int) -> npt.NDArray[Any]:
    with _parquet_file(path) as file:
        name = _column(path, array, file)
        ends = np.cumsum([0] + [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
        groups = [group for group in range(file.num_row_groups) if ends[group] < stop and ends[group + 1] > start]
        if not groups:
            return np.empty((0, 0), np.float32)
        column = file.read_row_groups(groups, columns=[name]).column(name)
    part = column.slice(start - int(ends[groups[0]]), stop - start)
    there = part.drop_null()
    floats = np.asarray(there.combine_chunks().flatten(), dtype=np.float32)
    if len(there) and (len(floats) % len(there) or len(set(pc.list_value_length(there).to_pylist())) > 1):
        raise PlanError(f"{path}: the lists of {name} are not all of one length")
    width = len(floats) // max(len(there), 1)
    out = np.full((len(part), width), np.nan, np.float32)
    out[np.asarray(part.is_valid())] = floats.reshape(len(there), width)
    return out


@contextmanager
def _parquet_file(path: str) -> Iterator[pq.ParquetFile]:
    try:
        with _open(path) as handle, pq.ParquetFile(handle) as file:
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk or the network, not of the content
            raise
        raise PlanError(f"{path} is no whole Parquet file: {error}") from None


def _column(path: str, array: str | None, file: pq.ParquetFile) -> str:
    """The column of vectors: lists of floats."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    lists = [
        field.name for field in file.schema_arrow
        if any(kind(field.type) for kind in kinds) and pa.types.is_floating(field.type.value_type)
    ]  # fmt: skip
    return _chosen(path, array, lists)


def _chosen(path: str, array: str | None, names: list[str]) -> str:
    if array is not None and array in names:
        return array
    if array is None and len(names) == 1:
        return names[0]
    raise PlanError(f"{path}: `array` is {array!r}; it has {', '.join(names) or 'no vectors'}")


def _open(path: str) -> BinaryIO:
    fs, inner = fsspec.core.url_to_fs(path)
    return cast(BinaryIO, fs.open(inner, "rb"))

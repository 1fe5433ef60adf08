"""Reference sets: images that the pool must not hold, and which of them a row reaches.

A set is a file of pHashes or of embeddings with an id each (`curate.config.ReferenceSettings`), or what a step before
has measured of its images (`score.reference_images`; `pipelines/frame.py` wires it). Every row of the pool
is compared with every image of the set, exactly, whatever the cells of the rule, and its nearest one is named; equally
near ones by the lower place in the file. Cosines count above the threshold (DINOv2: 0.45, DataComp: 0.604169, both
published as "greater than"). It refuses a file in which it finds no hashes or vectors, and vectors that can match
nothing (zero, NaN, infinite): an evaluation image would else stay in the pool unseen.
"""

import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curate.config import ReferenceSettings
from curate.dedup.hamming_tables import HashArray, plan_tables
from curate.dedup.near import FloatArray, IntArray
from curate.dedup.near_hashes import hashes_of, is_hash, similarity_of
from curate.errors import PlanError
from curate.store import Store
from curate.vectors import get_arrays, matrix, put_arrays

PAIRS_HELD = 1 << 22
_IDS = ("id", "ids", "key", "uid", "name", "path")


@dataclass(frozen=True, eq=False)
class Reference:
    """Ids [R] as strings, and uint64[R] hashes or float [R, d] vectors."""

    ids: npt.NDArray[np.str_]
    values: npt.NDArray[Any]


def sum_of(settings: ReferenceSettings, place: str) -> str:
    """sha256 of the set's file. Raises PlanError when it cannot be read."""
    return hashlib.sha256(_bytes(settings, place)).hexdigest()


def read_reference(settings: ReferenceSettings, place: str) -> Reference:
    """The set of a file. Raises PlanError."""
    data, path = _bytes(settings, place), settings.hashes or settings.embeddings or ""
    try:
        found = _hashes(data, path) if settings.hashes else _vectors(data, path)
    except (ValueError, EOFError, zipfile.BadZipFile, pa.ArrowException) as error:
        raise PlanError(f"{place}: {path}: {error}") from None
    if found.ids.shape != found.values.shape[:1]:
        raise PlanError(f"{place}: {path}: ids of shape {list(found.ids.shape)} for {len(found.values)} images")
    if not len(found.values):
        raise PlanError(f"{place}: {path}: no image in it; leave the set out, or write its images")
    return found


def measured_reference(store: Store, folder: str) -> Reference:
    """The set whose images were measured into this folder."""
    count = store.get_json(f"{folder}/measured.json")["pieces"]
    held = [get_arrays(store, f"{folder}/{number:08d}.npz") for number in range(count)]
    parts = [(part["ids"], part["values"]) for part in held if len(part["ids"])]
    ids, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Reference(ids, _plain(values) if values.ndim == 2 else hashes_of(values.tolist()))


def keep_reference(store: Store, path: str, reference: Reference) -> None:
    """Put a set where every worker can read it."""
    put_arrays(store, path, ids=reference.ids, values=reference.values)


def kept_reference(store: Store, path: str) -> Reference:
    """What `keep_reference` wrote."""
    found = get_arrays(store, path)
    return Reference(found["ids"], found["values"])


def nearest_hashes(hashes: HashArray, references: HashArray, radius: int) -> tuple[IntArray, FloatArray]:
    """The nearest reference within the radius of each hash: (int64[n], -1 where there is none; float32[n])."""
    distinct, inverse = np.unique(hashes, return_inverse=True)
    wanted, first = np.unique(references, return_index=True)  # the first of equal ones
    best = np.full(len(distinct), radius + 1, np.int64)
    place = np.full(len(distinct), len(references), np.int64)
    for rows, others in _candidates(distinct, wanted, radius):
        distance = np.bitwise_count(distinct[rows] ^ wanted[others]).astype(np.int64)
        near = np.flatnonzero(distance <= radius)
        near = near[np.lexsort((first[others[near]], distance[near], rows[near]))]
        near = near[np.r_[True, rows[near][1:] != rows[near][:-1]][: len(near)]]  # the nearest of each row
        mine, at, away = rows[near], first[others[near]], distance[near]
        nearer = (away < best[mine]) | ((away == best[mine]) & (at < place[mine]))
        best[mine[nearer]], place[mine[nearer]] = away[nearer], at[nearer]
    found = np.where(best <= radius, place, -1)
    return found[inverse.reshape(-1)], similarity_of(np.minimum(best, 64))[inverse.reshape(-1)]


def _candidates(hashes: HashArray, references: HashArray, radius: int) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield (positions in hashes, positions in references) that hold every pair within the radius."""
    if not len(hashes) or not len(references):
        return
    tables = plan_tables(references, radius, n=len(references)) if radius else None
    if tables is None:
        yield np.arange(len(hashes)), np.searchsorted(references, hashes).clip(max=len(references) - 1)
        return
    for table in range(max(1, len(tables))):
        if len(tables):
            shift = np.uint64(64 - tables.key_bits(table))
            keys = tables.permute(references, table) >> shift
            order = np.argsort(keys, kind="stable")
            asked = tables.permute(hashes, table) >> shift
            start, stop = (np.searchsorted(keys[order], asked, side) for side in ("left", "right"))
        else:
            order = np.arange(len(references))
            start, stop = np.zeros(len(hashes), np.int64), np.full(len(hashes), len(references))
        for at, end in _spans(stop - start):
            sizes = (stop - start)[at:end]
            rows = np.repeat(np.arange(at, end), sizes)
            offset = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            yield rows, order[start[rows] + offset]


def _spans(sizes: IntArray) -> Iterator[tuple[int, int]]:
    """Runs of rows that have about PAIRS_HELD candidates together."""
    total = np.cumsum(sizes)
    at = 0
    while at < len(sizes):
        before = int(total[at - 1]) if at else 0
        end = max(at + 1, int(np.searchsorted(total, before + PAIRS_HELD, "right")))
        yield at, end
        at = end


def _bytes(settings: ReferenceSettings, place: str) -> bytes:
    path = settings.hashes or settings.embeddings or ""
    try:
        with fsspec.open(path, "rb") as handle:
            data: bytes = handle.read()
    except (OSError, ValueError) as error:
        raise PlanError(f"{place}: {path} cannot be read: {error}") from None
    return data


def _hashes(data: bytes, path: str) -> Reference:
    if path.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(data))
        names = [field.name for field in table.schema if _is_text(field.type)]
        for name in sorted(names, key=lambda name: "hash" not in name):
            texts = table[name].to_pylist()
            if texts and all(text is None or is_hash(text) for text in texts):
                there = [text is not None for text in texts]
                ids = [one for one, has in zip(_ids(table, [name]) or texts, there, strict=True) if has]
                return Reference(np.array(ids, np.str_), hashes_of(texts))
        raise ValueError("no column of 16 hexadecimal digits")
    lines = [line.split(maxsplit=1) for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    wrong = next((line[0] for line in lines if not is_hash(line[0])), None)
    if wrong is not None:
        raise ValueError(f"{wrong[:40]!r} is not 16 hexadecimal digits")
    return Reference(np.array([line[-1].strip() for line in lines], np.str_), hashes_of([line[0] for line in lines]))


def _is_text(kind: pa.DataType) -> bool:
    """As pandas, Polars and `datasets` write strings."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _vectors(data: bytes, path: str) -> Reference:
    if path.endswith(".parquet"):
        return _vectors_of_table(pq.read_table(io.BytesIO(data)))
    held = np.load(io.BytesIO(data), allow_pickle=False)
    arrays = {"": held} if isinstance(held, np.ndarray) else dict(held)
    vectors = next((array for array in arrays.values() if array.ndim == 2 and array.dtype.kind == "f"), None)
    if vectors is None:
        raise ValueError("no array of floats [N, d]")
    ids = next((arrays[name] for name in _IDS if name in arrays), np.arange(len(vectors)))
    return Reference(ids.astype(np.str_), _plain(vectors))


def _vectors_of_table(table: pa.Table) -> Reference:
    for field in table.schema:
        kind = field.type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if lists and pa.types.is_floating(kind.value_type):
            column = table[field.name]
            if not pa.types.is_fixed_size_list(kind):
                there = column.drop_null()
                width = len(there[0]) if len(there) else 1
                column = column.cast(pa.list_(kind.value_type, width))
            vectors, valid = matrix(column)
            ids = np.array(_ids(table, []) or [str(row) for row in range(table.num_rows)], np.str_)
            return Reference(ids[valid], _plain(vectors))
    raise ValueError("no column of vectors")


def _ids(table: pa.Table, but: list[str]) -> list[str] | None:
    name = next((name for name in _IDS if name in table.column_names and name not in but), None)
    return None if name is None else [str(value) for value in table[name].to_pylist()]


def _plain(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """float16 as it is, all else as float32. Raises ValueError for vectors that can match nothing."""
    with np.errstate(over="ignore"):
        plain = np.ascontiguousarray(vectors if vectors.dtype == np.float16 else vectors.astype(np.float32))
    lost = np.flatnonzero(~np.isfinite(plain).all(axis=1) | ~plain.any(axis=1))
    if len(lost):
        raise ValueError(
            f"{len(lost)} of {len(plain)} vectors are zero, NaN or infinite (the first is number {lost[0]}): their "
            "images would stay in the pool unseen; embed them again or leave them out"
        )
    return plain

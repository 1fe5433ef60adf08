"""Keys of whole columns, and which of many rows came first: the arithmetic of removing duplicates.

Pure kernels: arrays in, arrays out. A key here is 16 raw bytes; `curate.schema.key_of` is its hexadecimal form and says
what is hashed. A partition is all keys whose first bits are the same number.
"""

from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

KEY_BYTES = 16
Raw = np.ndarray[tuple[int, int], np.dtype[np.uint8]]  # (rows, 16)
Rows = np.ndarray[tuple[int], np.dtype[np.int64]]


def hash_rows(urls: pa.Array, texts: pa.Array) -> Raw:
    """The raw key of each row, (rows, 16) uint8; equal to `bytes.fromhex(key_of(url, text))`.

    The bytes to hash are laid out by Arrow, which leaves one Python call a row: 1 us instead of 1.2 us and no strings.
    """
    parts = [*_prefixed(urls), *_prefixed(texts)]
    joined = pc.binary_join_element_wise(*parts, pa.scalar(b"", pa.large_binary()))
    digests = b"".join([blake2b(data, digest_size=KEY_BYTES).digest() for data in joined.to_pylist()])
    return np.frombuffer(digests, np.uint8).reshape(len(urls), KEY_BYTES)


def _prefixed(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Each value's length as 8 little-endian bytes (-1 for null), and its bytes."""
    lengths = pc.fill_null(pc.binary_length(values).cast(pa.int64()), -1).to_numpy()
    prefix = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(8), len(values), [None, pa.py_buffer(lengths.astype("<i8").tobytes())]
    )
    return prefix.cast(pa.large_binary()), pc.fill_null(values.cast(pa.large_binary()), b"")


def hex_keys(raw: Raw) -> pa.Array:
    """The `key` column: 32 lower-case hex digits a row."""
    digits = raw.tobytes().hex().encode()
    offsets = np.arange(0, len(digits) + 1, 2 * KEY_BYTES, dtype=np.int32)
    return pa.StringArray.from_buffers(len(raw), pa.py_buffer(offsets), pa.py_buffer(digits))


def partition_of(raw: Raw, partitions: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """The partition of each key, by its first bits; `partitions` is a power of two up to 65,536."""
    first = (raw[:, 0].astype(np.uint32) << 8) | raw[:, 1]
    return (first >> (17 - partitions.bit_length())).astype(np.uint32)


def sort_keys(raw: Raw) -> Rows:
    """Row numbers in order of key; rows with the same key stay in order."""
    high, low = _halves(raw)
    order = np.argsort(high, kind="stable")
    sorted_high, sorted_low = high[order], low[order]
    if np.any((sorted_high[1:] == sorted_high[:-1]) & (sorted_low[1:] < sorted_low[:-1])):
        order = np.lexsort((low, high))  # two keys share 64 bits: never seen, and still exact
    return order.astype(np.int64)


def same_as_before(sorted_raw: Raw) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """For keys in order: whether a key equals the one before it."""
    same = np.zeros(len(sorted_raw), np.bool_)
    high, low = _halves(sorted_raw)
    same[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    return same


def merge(one: Raw, other: Raw) -> Raw:
    """Keys of both, in order."""
    both = np.concatenate([one, other])
    return both[sort_keys(both)]


def among(raw: Raw, known: Raw) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether each key is one of `known`; both in order and without repeats."""
    both = np.concatenate([known, raw])
    order = sort_keys(both)
    repeated = order[same_as_before(both[order])]  # stable: of two equal keys the second is the one of `raw`
    found = np.zeros(len(raw), np.bool_)
    found[repeated - len(known)] = True
    return found


def _halves(raw: Raw) -> tuple[np.ndarray, np.ndarray]:
    words = np.ascontiguousarray(raw).view(">u8")
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)

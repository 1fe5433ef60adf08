"""Numbers out of a zipped TensorFlow SavedModel, without TensorFlow.

LAION published its NSFW heads as SavedModels only, and TensorFlow must not be a run-time dependency. So this reads
the three formats that hold the numbers: protobuf wire format (the graph's Const nodes), the sorted string table of
`variables.index`, and the raw little-endian bytes of the data shards. Formats: protobuf.dev "Encoding",
tensorflow/core/lib/io/table_format.txt and tensorflow/core/protobuf/{meta_graph,tensor_bundle}.proto.
Refuses everything else: no graph is executed, no pickle read, and a damaged file is a WeightsError. Damage inside the
zip's members is caught by the zip's own CRC-32 on reading.
"""

import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from curate.errors import WeightsError

Tensor = npt.NDArray[np.float32] | npt.NDArray[np.int64]
Message = dict[int, list[int | memoryview]]  # field number -> its values, in order

MOST_BYTES = 64 << 20  # of one member; the published ones have 4 MB, and a zip bomb shall not fill the memory
TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
DT_FLOAT, DT_STRING, DT_INT64 = 1, 7, 9  # tensorflow/core/framework/types.proto
ITEM_BYTES = {DT_FLOAT: 4, DT_INT64: 8}


@dataclass(frozen=True, slots=True)
class SavedModel:
    """What a SavedModel holds: `consts` in graph order (numbers, or lists of strings), and `variables` by key.

    `keys` are all keys of the checkpoint, those of tables with string values included.
    """

    consts: Sequence[Tensor | list[bytes]]
    variables: Mapping[str, Tensor]
    keys: frozenset[str]


def read_saved_model(path: Path | str) -> SavedModel:
    """Read a zip with one SavedModel folder.

    Raises WeightsError when the file is missing, is not such a zip, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            graph = _member(archive, "saved_model.pb")
            index = _member(archive, "variables/variables.index")
            count = sum("variables/variables.data-" in name for name in archive.namelist())
            shards = [_member(archive, f"variables/variables.data-{i:05d}-of-{count:05d}") for i in range(count)]
        entries = dict(_table(index))
        variables = {key: tensor for key, value in entries.items() if (tensor := _variable(value, shards)) is not None}
        return SavedModel(list(_consts(graph)), variables, frozenset(entries))
    except FileNotFoundError as cause:
        raise WeightsError(f"no file at {path}; run `curate weights pull`") from cause
    except (zipfile.BadZipFile, OSError, ValueError, IndexError, KeyError, struct.error, EOFError) as cause:
        raise WeightsError(f"{path} is not a zipped TensorFlow SavedModel, or is damaged: {cause}") from cause


def _member(archive: zipfile.ZipFile, ending: str) -> memoryview:
    names = [name for name in archive.namelist() if name.endswith(ending)]
    if len(names) != 1:
        raise ValueError(f"expected one {ending}, found {names}")
    if archive.getinfo(names[0]).file_size > MOST_BYTES:
        raise ValueError(f"{names[0]} is larger than {MOST_BYTES} bytes")
    return memoryview(archive.read(names[0]))


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Base-128 number at `at`, and where it ends."""
    value = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number of more than 64 bits")


def _slice(data: memoryview, at: int, length: int) -> memoryview:
    if at < 0 or length < 0 or at + length > len(data):
        raise ValueError(f"{length} bytes at {at} wanted, {len(data)} there")
    return data[at : at + length]


def _message(data: memoryview) -> Message:
    """Fields of one protobuf message; 32- and 64-bit fields stay raw bytes."""
    fields: Message = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value: int | memoryview
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            length, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value = _slice(data, at, length)
            at += length
        else:
            raise ValueError(f"protobuf wire type {kind}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _bytes(message: Message, field: int) -> memoryview:
    value = message.get(field, [memoryview(b"")])[0]
    if isinstance(value, int):
        raise ValueError(f"field {field} is a number, expected bytes")
    return value


def _int(message: Message, field: int) -> int:
    value = message.get(field, [0])[0]
    if not isinstance(value, int):
        raise ValueError(f"field {field} is bytes, expected a number")
    return value


def _all(message: Message, field: int) -> list[memoryview]:
    return [value for value in message.get(field, []) if not isinstance(value, int)]


def _shape(data: memoryview) -> tuple[int, ...]:
    """TensorShapeProto: dim = 2, each with size = 1."""
    return tuple(_int(_message(dim), 1) for dim in _all(_message(data), 2))


def _consts(graph: memoryview) -> Iterator[Tensor | list[bytes]]:
    """Const nodes of the first graph: SavedModel.meta_graphs = 2, .graph_def = 2, .node = 1; of rank 1 and more."""
    nodes = _all(_message(_bytes(_message(_bytes(_message(graph), 2)), 2)), 1)
    for node in map(_message, nodes):
        if bytes(_bytes(node, 2)) != b"Const":
            continue
        attributes = {bytes(_bytes(entry, 1)): _bytes(entry, 2) for entry in map(_message, _all(node, 5))}
        tensor = _message(_bytes(_message(attributes[b"value"]), 8))
        shape, dtype, content = _shape(_bytes(tensor, 2)), _int(tensor, 1), _bytes(tensor, 4)
        if shape and dtype == DT_STRING:
            yield [bytes(text) for text in _all(tensor, 8)]
        elif shape and dtype in ITEM_BYTES and content:
            yield _tensor(content, dtype, shape)


def _tensor(data: memoryview, dtype: int, shape: tuple[int, ...]) -> Tensor:
    if len(data) != prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{len(data)} bytes for a tensor of shape {list(shape)}")
    if dtype == DT_FLOAT:
        return np.frombuffer(data, dtype="<f4").astype(np.float32).reshape(shape)
    return np.frombuffer(data, dtype="<i8").astype(np.int64).reshape(shape)


def _variable(entry: memoryview, shards: Sequence[memoryview]) -> Tensor | None:
    """BundleEntryProto: dtype = 1, shape = 2, shard = 3, offset = 4, size = 5; None for other types."""
    fields = _message(entry)
    dtype = _int(fields, 1)
    if dtype not in ITEM_BYTES:
        return None
    data = _slice(shards[_int(fields, 3)], _int(fields, 4), _int(fields, 5))
    return _tensor(data, dtype, _shape(_bytes(fields, 2))) if data else None


def _table(data: memoryview) -> Iterator[tuple[str, memoryview]]:
    """(key, value) of a sorted string table; the empty key, which is the bundle's header, is left out."""
    if len(data) < FOOTER_BYTES or struct.unpack("<Q", data[-8:])[0] != TABLE_MAGIC:
        raise ValueError("variables.index has no table footer")
    footer = data[-FOOTER_BYTES:]
    _, at = _varint(footer, 0)
    _, at = _varint(footer, at)  # the first handle is of the meta index, which tells nothing here
    for _, handle in _block(data, footer[at:]):
        for key, value in _block(data, handle):
            if key:
                yield key.decode(), value


def _block(data: memoryview, handle: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Entries of one block: keys share a prefix with the one before; restart points close the block."""
    offset, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    block = _slice(data, offset, size)
    if _slice(data, offset + size, 1)[0] != 0:
        raise ValueError("a compressed block in variables.index")
    restarts = struct.unpack("<I", _slice(block, len(block) - 4, 4))[0]
    entries = _slice(block, 0, len(block) - 4 - 4 * restarts)
    key, at = b"", 0
    while at < len(entries):
        shared, at = _varint(entries, at)
        own, at = _varint(entries, at)
        length, at = _varint(entries, at)
        key = key[:shared] + bytes(_slice(entries, at, own))
        yield key, _slice(entries, at + own, length)
        at += own + length

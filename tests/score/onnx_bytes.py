"""Tiny ONNX files written in protobuf wire format, so that tests need no `onnx` package and no weights."""

from pathlib import Path

import numpy as np

FLOAT = 1  # onnx TensorProto.DataType


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: bytes | str | int) -> bytes:
    """One protobuf field: a number as varint, anything else by length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def node(kind: str, inputs: list[str], outputs: list[str], **numbers: int | list[int]) -> bytes:
    """NodeProto with attributes that are integers or lists of them."""
    attributes = (
        field(5, field(1, name) + b"".join(field(8, one) for one in value) + field(20, 7))
        if isinstance(value, list)
        else field(5, field(1, name) + field(3, value) + field(20, 2))
        for name, value in numbers.items()
    )
    names = [field(1, name) for name in inputs] + [field(2, name) for name in outputs]
    return b"".join(names) + field(4, kind) + b"".join(attributes)


def _value(name: str, dims: list[int | str]) -> bytes:
    shape = b"".join(field(1, field(2, dim) if isinstance(dim, str) else field(1, dim)) for dim in dims)
    return field(1, name) + field(2, field(1, field(1, FLOAT) + field(2, shape)))


def write_onnx(
    path: Path,
    nodes: list[bytes],
    inputs: dict[str, list[int | str]],
    outputs: dict[str, list[int | str]],
    weights: dict[str, np.ndarray],
) -> Path:
    """A float32 model of opset 13; returns the path."""
    graph = b"".join(field(1, one) for one in nodes) + field(2, "g")
    for name, array in weights.items():
        data = np.ascontiguousarray(array, dtype="<f4")
        dims = b"".join(field(1, size) for size in data.shape)
        graph += field(5, dims + field(2, FLOAT) + field(8, name) + field(9, data.tobytes()))
    graph += b"".join(field(11, _value(name, dims)) for name, dims in inputs.items())
    graph += b"".join(field(12, _value(name, dims)) for name, dims in outputs.items())
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13)))
    return path

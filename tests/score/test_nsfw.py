"""LAION's NSFW head against TensorFlow's outputs, and against a SavedModel written byte by byte here."""

import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from curate.errors import WeightsError
from curate.score.nsfw import LaionNsfwHead, Vocabulary
from curate.score.saved_model import TABLE_MAGIC, read_saved_model
from tests.score.onnx_bytes import field, varint

SHARED = os.environ.get("CURATE_SHARED")
MODELS = ["clip_autokeras_binary_nsfw", "clip_autokeras_nsfw_b32"]


def shape(*sizes: int) -> bytes:
    return b"".join(field(2, field(1, size)) for size in sizes)


def const(tensor: bytes) -> bytes:
    return field(1, field(1, b"c") + field(2, b"Const") + field(5, field(1, b"value") + field(2, field(8, tensor))))


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(varint(0) + varint(len(k)) + varint(len(v)) + k + v for k, v in entries)
    return body + struct.pack("<II", 0, 1)


def write_model(path: Path, *, width: int = 4, column: int = 2, compressed: bool = False) -> dict[str, np.ndarray]:
    """A small head in the published form: one categorical column, Normalization, two dense layers."""
    rng = np.random.default_rng(0)
    tensors = {
        "1/mean": rng.normal(size=(1, width)),
        "1/variance": rng.uniform(0.5, 2, size=(1, width)),
        "2/kernel": rng.normal(size=(width, 3)),
        "2/bias": rng.normal(size=3),
        "3/kernel": rng.normal(size=(3, 1)),
        "3/bias": rng.normal(size=1),
    }
    tensors = {key: value.astype("<f4") for key, value in tensors.items()}
    entries, data = [(b"", field(1, 1))], b""
    table = f"layer_with_weights-0/encoding_layers/{column}/token_counts/.ATTRIBUTES/table-keys"
    entries.append((table.encode(), field(1, 7) + field(2, shape(0))))
    for name, value in tensors.items():
        entry = field(1, 1) + field(2, shape(*value.shape)) + field(4, len(data)) + field(5, value.nbytes)
        entries.append((f"layer_with_weights-{name}/.ATTRIBUTES/VARIABLE_VALUE".encode(), entry))
        data += value.tobytes()
    first = block(entries)
    handle = varint(0) + varint(len(first))
    first += bytes([compressed]) + b"\0\0\0\0"
    index = block([(b"z", handle)])
    footer = varint(0) + varint(0) + varint(len(first)) + varint(len(index))
    file = first + index + b"\0" * 5 + footer.ljust(40, b"\0") + struct.pack("<Q", TABLE_MAGIC)
    words, codes = [b"0.125000", b"-0.250000", b"-0.000000", b"nan"], np.array([3, 1, 2, 4], dtype="<i8")
    nodes = const(field(1, 7) + field(2, shape(4)) + b"".join(field(8, word) for word in words))
    nodes += const(field(1, 9) + field(2, shape(4)) + field(4, codes.tobytes()))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/saved_model.pb", field(2, field(2, nodes)))
        archive.writestr("m/variables/variables.index", file)
        archive.writestr("m/variables/variables.data-00000-of-00001", data)
    return tensors


def forward(tensors: dict[str, np.ndarray], row: np.ndarray, code: float) -> float:
    """One row, written out in float64."""
    hidden = row.astype(np.float64)
    hidden[2] = code
    hidden = (hidden - tensors["1/mean"][0]) / np.sqrt(tensors["1/variance"][0])
    hidden = np.maximum(hidden @ tensors["2/kernel"] + tensors["2/bias"], 0)
    return float(1 / (1 + np.exp(-(hidden @ tensors["3/kernel"] + tensors["3/bias"])[0])))


@pytest.mark.skipif(SHARED is None, reason="needs the published zips: set CURATE_SHARED")
@pytest.mark.parametrize("model", MODELS)
def test_equals_tensorflow(model: str) -> None:
    """A port that drops the vocabulary is wrong by up to 0.4; a wrong reader is wrong everywhere."""
    folder = Path(SHARED or "") / "reference"
    features = np.load(folder / f"{model}_x.npy").astype(np.float32)
    wanted = np.load(folder / f"{model}_y.npy").reshape(-1)
    got = LaionNsfwHead.from_zip(folder / f"{model}.zip")(features)
    assert got.dtype == np.float32
    assert np.abs(got - wanted).max() < 1e-5


def test_reads_a_model_written_here(tmp_path: Path) -> None:
    """The reader must not depend on the two published files alone; hits, misses and minus zero are different codes."""
    tensors = write_model(tmp_path / "m.zip")
    head = LaionNsfwHead.from_zip(tmp_path / "m.zip")
    rows = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    rows[:, 2] = [0.125, -0.25, -0.0, 0.0, 0.5]
    wanted = [forward(tensors, row, code) for row, code in zip(rows, [3, 1, 2, 0, 0], strict=True)]
    np.testing.assert_allclose(head(rows), wanted, atol=1e-6)


def test_a_row_without_numbers_has_no_score(tmp_path: Path) -> None:
    """TensorFlow's graph turns NaN into 0 and answers; here a broken feature never gets a plausible score."""
    write_model(tmp_path / "m.zip")
    head = LaionNsfwHead.from_zip(tmp_path / "m.zip")
    rows = np.ones((4, 4), dtype=np.float32)
    rows[1, 0], rows[2, 2], rows[3, 3] = np.nan, np.inf, 3e38
    before = rows.copy()
    scores = head(rows)
    assert np.isnan(scores).tolist()[:3] == [False, True, True]
    assert not np.isinf(scores).any()
    np.testing.assert_array_equal(rows, before)
    assert head(np.zeros((0, 4), dtype=np.float32)).shape == (0,)
    with pytest.raises(ValueError, match="expected features"):
        head(np.ones((1, 5), dtype=np.float32))


def test_words_are_printed_numbers() -> None:
    """The look-up compares six printed decimals; comparing floats would miss, or hit a neighbour."""
    words = np.array([-62683, 0, 1, 125488], dtype=np.int64)
    vocabulary = Vocabulary(0, words, np.array([1, 2, 3, 4], dtype=np.float32))
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(0, 0.1, 500), [0.125488, -0.0626831, 4e-7, -4e-7, 5.1e-7, 0.0]])
    values = values.astype(np.float16).astype(np.float32).tolist() + values.astype(np.float32).tolist()
    codes = {"-0.062683": 1.0, "0.000000": 2.0, "0.000001": 3.0, "0.125488": 4.0}
    wanted = [codes.get(f"{value:f}", 0.0) for value in values]
    assert vocabulary.encode(np.array(values, dtype=np.float32)).tolist() == wanted


@pytest.mark.parametrize("member", ["m/saved_model.pb", "m/variables/variables.index"])
def test_damage_is_a_weights_error(tmp_path: Path, member: str) -> None:
    """A truncated or scrambled file must name itself in the plan, not raise an IndexError in a worker."""
    write_model(tmp_path / "m.zip")
    with zipfile.ZipFile(tmp_path / "m.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    rng = np.random.default_rng(3)
    raised = 0
    for trial in range(60):
        content = bytearray(members[member])
        content[int(rng.integers(len(content)))] ^= int(rng.integers(1, 256))
        if trial % 2:
            del content[int(rng.integers(len(content))) :]
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, bytes(content) if name == member else data)
        try:
            LaionNsfwHead.from_zip(tmp_path / "bad.zip")
        except WeightsError:
            raised += 1
    assert raised >= 30


def test_other_files_are_refused(tmp_path: Path) -> None:
    """No file, no zip, a zip of something else, and a compressed index each end in a WeightsError."""
    (tmp_path / "text.zip").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    write_model(tmp_path / "compressed.zip", compressed=True)
    for name in ("none.zip", "text.zip", "other.zip", "compressed.zip"):
        with pytest.raises(WeightsError, match=name):
            read_saved_model(tmp_path / name)

"""Reference sets: every reader, every match, the nearest one named."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.config import DedupSettings, ReferenceSettings
from curate.dedup.near_hashes import hashes_of
from curate.dedup.reference_vectors import NearestVectors
from curate.dedup.references import nearest_hashes, read_reference
from curate.errors import PlanError
from tests.dedup.pool import VectorPool, cosines


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9_999), st.integers(0, 60), st.integers(0, 60), st.sampled_from([0, 1, 3, 6, 10]))
def test_nearest_hash_is_that_of_brute_force(seed: int, n: int, m: int, radius: int) -> None:
    """Guards against an evaluation image that is missed in another table, or named wrongly."""
    draw = np.random.default_rng(seed)
    references = draw.integers(0, 1 << 63, m, dtype=np.uint64)
    references[m // 2 :] = references[: m - m // 2]
    hashes = draw.integers(0, 1 << 63, n, dtype=np.uint64)
    for row in range(0, n if m else 0, 2):
        hashes[row] = references[draw.integers(m)]
        for bit in draw.integers(0, 64, draw.integers(0, radius + 2)):
            hashes[row] ^= np.uint64(1) << np.uint64(bit)
    place, similarity = nearest_hashes(hashes, references, radius)
    for row in range(n):
        distance = np.bitwise_count(references ^ hashes[row])
        if m and distance.min() <= radius:
            assert place[row] == distance.argmin()
            assert similarity[row] == pytest.approx(1 - distance.min() / 64)
        else:
            assert place[row] == -1


def test_nearest_hash_through_tables_is_that_of_brute_force() -> None:
    """Guards against candidates that one of many tables loses; enough references that tables are planned."""
    draw = np.random.default_rng(1)
    references = draw.integers(0, 1 << 63, 60_000, dtype=np.uint64)
    hashes = draw.integers(0, 1 << 63, 2_000, dtype=np.uint64)
    hashes[::2] = references[draw.integers(0, 60_000, 1_000)]
    for row in range(0, 2_000, 4):
        hashes[row] ^= np.uint64(1) << np.uint64(draw.integers(64)) | np.uint64(1) << np.uint64(draw.integers(64))
    place, _ = nearest_hashes(hashes, references, 3)
    assert (place[::2] >= 0).all()
    for row in range(0, 2_000, 50):
        distance = np.bitwise_count(references ^ hashes[row])
        assert place[row] == (distance.argmin() if distance.min() <= 3 else -1)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_nearest_vector_is_that_of_brute_force(dtype: str) -> None:
    """Guards against a reference that rounding or a tile hides, equal references, and rows without a direction."""
    draw = np.random.default_rng(2)
    references = draw.standard_normal((70, 12))
    references[40:] = references[:30]
    references[5] = np.nan
    vectors = np.concatenate(
        [references[draw.integers(0, 70, 50)] + 0.3 * draw.standard_normal((50, 12)), np.zeros((2, 12))]
    )
    vectors[7] = vectors[8] = vectors[9]
    references, vectors = references.astype(dtype), vectors.astype(dtype)
    place, similarity = NearestVectors(references, 0.8).of(vectors)  # type: ignore[arg-type]
    matrix = cosines(np.concatenate([vectors, references]))[:52, 52:]
    for row in range(52):
        if matrix[row].max() > np.float32(0.8):
            assert place[row] == matrix[row].argmax() and similarity[row] == pytest.approx(matrix[row].max())
        else:
            assert place[row] == -1
    assert (place >= 0).sum() > 20


def test_what_other_libraries_write_is_read(tmp_path: Path) -> None:
    """A file of Polars, pandas or a Windows editor that is said to hold no hashes, or no vectors."""
    hashes, ids = ["000000000000000a", "00000000000000FF"], ["a\u2028b", "c d"]
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        file = tmp_path / "h.parquet"
        pq.write_table(pa.table({"id": ids, "phash": pa.array(hashes, pa.string()).cast(kind)}), file)
        read = read_reference(ReferenceSettings(name="s", hashes=str(file)), "here")
        assert read.values.tolist() == [10, 255] and read.ids.tolist() == ids
    text = tmp_path / "h.txt"
    text.write_bytes("".join(f"{h} {i}\r\n" for h, i in zip(hashes, ids, strict=True)).encode("utf-8-sig"))
    read = read_reference(ReferenceSettings(name="s", hashes=str(text)), "here")
    assert read.values.tolist() == [10, 255] and read.ids.tolist() == ids
    file = tmp_path / "v.parquet"
    pq.write_table(pa.table({"e": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.large_list(pa.float32()))}), file)
    assert read_reference(ReferenceSettings(name="s", embeddings=str(file)), "here").values.shape == (2, 2)


def test_every_form_of_a_set_is_read(tmp_path: Path) -> None:
    """Guards against ids that slip by a row, and a column that is taken for hashes."""
    hashes = ["00ff00ff00ff00ff", "ABCDEF0123456789"]
    (tmp_path / "a.txt").write_text(f"{hashes[0]}\n\n{hashes[1]}\tval/1.jpg\n")
    found = read_reference(ReferenceSettings(name="a", hashes=str(tmp_path / "a.txt")), "here")
    assert found.ids.tolist() == [hashes[0], "val/1.jpg"]
    assert found.values.tolist() == hashes_of(hashes).tolist()
    table = pa.table({"id": ["x", "y", "z"], "text": ["u", "v", "w"], "image_phash": [hashes[0], None, hashes[1]]})
    pq.write_table(table, tmp_path / "b.parquet")
    found = read_reference(ReferenceSettings(name="b", hashes=str(tmp_path / "b.parquet")), "here")
    assert found.ids.tolist() == ["x", "z"] and found.values.tolist() == hashes_of(hashes).tolist()
    vectors = np.eye(3, 4, dtype=np.float64)
    np.save(tmp_path / "c.npy", vectors)
    np.savez(tmp_path / "d.npz", ids=np.array(["p", "q", "r"]), vectors=vectors)
    pq.write_table(pa.table({"key": ["p", "q", "r"], "v": list(vectors)}), tmp_path / "e.parquet")
    for name, ids in (("c.npy", ["0", "1", "2"]), ("d.npz", ["p", "q", "r"]), ("e.parquet", ["p", "q", "r"])):
        found = read_reference(ReferenceSettings(name="v", embeddings=str(tmp_path / name)), "here")
        assert found.ids.tolist() == ids
        np.testing.assert_array_equal(found.values, vectors)
    (tmp_path / "wrong.txt").write_text("00ff00ff00ff00f\n")
    with pytest.raises(PlanError, match="'00ff00ff00ff00f' is not 16"):
        read_reference(ReferenceSettings(name="a", hashes=str(tmp_path / "wrong.txt")), "here")


def test_a_set_that_guards_nothing_is_refused(tmp_path: Path) -> None:
    """Guards against evaluation images that stay in the pool because their file is empty, damaged or without values."""
    row = np.ones((1, 4), np.float32)
    saved = {
        "empty.npy": row[:0], "lost.npy": np.concatenate([row, row * np.nan]), "zero.npy": 0 * row,
        "huge.npy": np.full((2, 4), 1e300), "whole.npy": row.astype(np.int64),
    }  # fmt: skip
    for name, array in saved.items():
        np.save(tmp_path / name, array)
    for name, ids in (("one.npz", np.array("a")), ("deep.npz", np.array([["a"]])), ("two.npz", np.array(["a", "b"]))):
        np.savez(tmp_path / name, ids=ids, vectors=row)
    for name, data in (("none.npy", b""), ("cut.npz", b"PK\x03\x04"), ("cut.parquet", b"PAR1"), ("none.txt", b"\n")):
        (tmp_path / name).write_bytes(data)
    says = {
        "empty.npy": "no image", "lost.npy": "1 of 2 vectors .*number 1", "zero.npy": "1 of 1", "huge.npy": "2 of 2",
        "whole.npy": "no array of floats", "one.npz": "ids of shape", "deep.npz": "ids of shape",
        "two.npz": "ids of shape", "none.npy": "none.npy", "cut.npz": "cut.npz", "cut.parquet": "cut.parquet",
        "none.txt": "no image",
    }  # fmt: skip
    for name, words in says.items():
        kind = "hashes" if name.endswith(".txt") else "embeddings"
        one = ReferenceSettings.model_validate({"name": "val", kind: str(tmp_path / name)})
        with pytest.raises(PlanError, match=words):
            read_reference(one, "here")


def test_evaluation_hashes_exclude_as_coyo_did(tmp_path: Path) -> None:
    """COYO drops what has the pHash of an evaluation image (radius 0); with a radius, components or hits alone."""
    hashes = [f"{value:016x}" for value in (0b0, 0b1, 0b11, 0b111, 1 << 60, 1 << 60, (1 << 40) - 1)]
    (tmp_path / "coco.txt").write_text(f"{0:016x} coco/7\n{1 << 60:016x} coco/8\n")
    pool = VectorPool(tmp_path / "pool", np.ones((7, 4), np.float32), 3, hashes=hashes)

    def marked(**reference: object) -> list[str | None]:
        one = ReferenceSettings.model_validate({"name": "coco", "hashes": str(tmp_path / "coco.txt"), **reference})
        step, _ = pool.run(DedupSettings(by="image_phash", within=False, against=[one]))
        rows = pool.rows(step)
        assert {row["duplicate_kind"] for row in rows} == {None, "reference:coco"}
        return [row["duplicate_of"] for row in rows]

    none, seven, eight = None, "coco/7", "coco/8"
    assert marked() == [seven, none, none, none, eight, eight, none]
    assert marked(radius=1, match="direct") == [seven, seven, none, none, eight, eight, none]
    assert marked(radius=1) == [seven, seven, seven, seven, eight, eight, none]

"""The published tables, recognised by their columns, each taken through the step."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from curate.errors import SourceError
from curate.ingest.schemas import recognise, unite
from curate.schema import SAMPLE_FIELDS
from curate.store import Store
from tests.ingest.pool import ingest, rows_of, write_parquet

URLS, TEXTS = ["http://a.example/1.jpg", "http://a.example/2.jpg"], ["one", "two"]
COYO: dict[str, Any] = {
    "id": [1, 2], "url": URLS, "text": TEXTS, "width": [600, 300], "height": [447, 200],
    "image_phash": ["bac58374982e0fc7"] * 2, "text_length": [3, 3], "word_count": [1, 1], "num_tokens_bert": [1, 1],
    "num_tokens_gpt": [1, 1], "num_faces": [0, 0], "clip_similarity_vitb32": [0.3, 0.2],
    "clip_similarity_vitl14": [0.2, 0.1], "nsfw_score_opennsfw2": [0.0, 0.0], "nsfw_score_gantman": [0.0, 0.0],
    "watermark_score": [0.1, 0.1], "aesthetic_score_laion_v2": [4.7, 5.0],
}  # fmt: skip
LAION = {"URL": URLS, "TEXT": TEXTS, "WIDTH": [600, 300], "HEIGHT": [447, 200], "similarity": [0.3, 0.4]}
SIZES = {"width": [600, 300], "height": [447, 200]}
TABLES: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "coyo-700m": (COYO, {**SIZES, "id": [1, 2], "aesthetic_score_laion_v2": [4.7, 5.0]}),
    "laion-400m": ({"SAMPLE_ID": [7, 8], **LAION, "LICENSE": ["?"] * 2, "NSFW": ["UNLIKELY"] * 2}, SIZES),
    "laion-5b": (LAION, {"width": [447, 200], "height": [600, 300]}),
    "laion-5b joined": ({**LAION, "hash": [1, 2], "punsafe": [0.1, 0.2], "pwatermark": [0.5, 0.1]}, SIZES),
    "re-laion-5b": (
        {"url": URLS, "caption": TEXTS, "similarity": [0.3, 0.4], "punsafe": [0.1, 0.2], "key": ["0", "1"], **SIZES},
        {**SIZES, "source_key": ["0", "1"]},
    ),
    "datacomp": (
        {
            "uid": ["a" * 32, "b" * 32], "url": URLS, "text": TEXTS, "original_width": [1, 2],
            "original_height": [3, 4], "clip_b32_similarity_score": [0.1, 0.2],
            "clip_l14_similarity_score": [0.1, 0.2], "face_bboxes": [[[0.0, 0.1, 0.2, 0.3]], []],
            "sha256": ["c" * 64, "d" * 64],
        },
        {"uid": ["a" * 32, "b" * 32], "face_bboxes": [[[0.0, 0.1, 0.2, 0.3]], []], "sha256": ["c" * 64, "d" * 64]},
    ),
    "url and text": ({"url": URLS, "text": TEXTS}, {}),
    "URL and TEXT": ({"URL": URLS, "TEXT": TEXTS, "AESTHETIC_SCORE": [6.1, 6.2]}, {"AESTHETIC_SCORE": [6.1, 6.2]}),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_published_tables_are_recognised(name: str, tmp_path: Path) -> None:
    """Guards against a table read with another one's meaning, LAION-5B's exchanged width and height above all."""
    columns, expected = TABLES[name]
    assert recognise("x", list(columns), {}).name == name
    store = Store(str(tmp_path / "root"))
    samples, counts = ingest(store, [write_parquet(tmp_path / "a.parquet", columns)])
    rows = rows_of(store, samples)
    assert counts["samples"] == 2
    assert [(row["url"], row["text"]) for row in rows] == list(zip(URLS, TEXTS, strict=True))
    for column, values in expected.items():
        assert [row[column] for row in rows] == values


def test_unknown_and_ambiguous_tables_say_what_to_write() -> None:
    """Guards against a guess: a wrong text column costs a whole download."""
    with pytest.raises(SourceError, match=r"found: link, label.*columns: \{url"):
        recognise("x.parquet", ["link", "label"], {})
    with pytest.raises(SourceError, match="ambiguous columns"):
        recognise("x.parquet", ["url", "text", "caption"], {})
    with pytest.raises(SourceError, match="ambiguous columns"):
        recognise("x.parquet", ["url", "text", "URL", "TEXT"], {})
    with pytest.raises(SourceError, match="no column CAPTION"):
        recognise("x.parquet", ["url", "text"], {"url": "url", "text": "CAPTION"})
    with pytest.raises(SourceError, match="`url` must be there"):
        recognise("x.parquet", ["url", "text"], {"text": "text"})


def test_columns_name_any_table(tmp_path: Path) -> None:
    """Guards against a table that curate cannot take because nobody foresaw it; and its own `url` stays readable."""
    table = {"link": URLS, "alt": TEXTS, "url": ["p", "q"], "W": [1, 2]}
    store = Store(str(tmp_path / "root"))
    mapping = {"url": "link", "text": "alt", "width": "W"}
    samples, _ = ingest(store, [write_parquet(tmp_path / "a.parquet", table)], columns=mapping)
    first = rows_of(store, samples)[0]
    assert (first["url"], first["text"], first["source_url"], first["width"]) == (URLS[0], "one", "p", 1)


def test_tables_of_different_schemas_share_a_pool(tmp_path: Path) -> None:
    """Guards against types that change under a committed pool: an earlier shard would no longer be readable."""
    store = Store(str(tmp_path / "root"))
    narrow = pa.array([1], pa.int32())
    first = write_parquet(tmp_path / "a.parquet", {"url": ["http://a"], "text": ["x"], "width": narrow})
    second = write_parquet(tmp_path / "b.parquet", {"URL": ["http://b"], "TEXT": ["y"], "WIDTH": [2**40], "NEW": ["n"]})
    ingest(store, [first])
    samples, counts = ingest(store, [first, second])
    rows = rows_of(store, samples)
    assert samples.schema.field("width").type == pa.int32()
    assert [(row["width"], row["NEW"]) for row in rows] == [(1, None), (None, "n")]
    assert counts["bad_values"] == 1


def test_new_sources_that_disagree_get_the_wider_type() -> None:
    """Guards against the order of files deciding what fits."""
    kinds = {"a": ("x", pa.int32()), "b": ("X", pa.float64()), "c": ("y", pa.null())}
    fields = [(path, pa.schema([field])) for path, field in kinds.items()]
    united = unite(None, fields)
    assert united.field("x").type == pa.float64()
    assert united.field("y").type == pa.string()
    assert united.names == [*(field.name for field in SAMPLE_FIELDS), "x", "y"]
    with pytest.raises(SourceError, match="in other sources"):
        unite(None, [*fields[:1], ("d", pa.schema([("x", pa.list_(pa.int32()))]))])

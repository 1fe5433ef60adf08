"""Text tables as they are found, pruning, and rows whose URL is none."""

import gzip
import json
from collections import Counter
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pytest

from curate.errors import PlanError, SourceError
from curate.ingest import delimited
from curate.ingest.sources import find_tables
from curate.schema import keys_of
from curate.store import Store
from tests.ingest.pool import ingest, rows_of, write_parquet

MESSY = (
    "url,text,width\n"
    'http://a,"he said ""hi""",3\n'
    'http://b,"two\nlines",4\n'
    'http://c,"never closed,5\n'
    'http://d,5" pipe,6\n'
    "http://e,too few\n"
    ",no address,7\n"
    'http://f,"quoted"tail,8\n'
)


@pytest.mark.parametrize("block", [8, 40, 64, 4 * 2**20])
def test_messy_csv_loses_only_what_is_broken(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a quote that swallows its neighbours, wherever the blocks of reading are cut."""
    monkeypatch.setattr(delimited, "BLOCK_BYTES", block)
    header, schema, _ = delimited.infer("x.csv", MESSY.encode(), "csv")
    counts: Counter[str] = Counter()
    batches = delimited.batches(BytesIO(MESSY.encode()), "csv", schema.names, header, counts)
    texts = [row["text"] for batch in batches for row in batch.to_pylist()]
    assert texts == ['he said "hi"', "two\nlines", '"never closed', '5" pipe', "no address", "quotedtail"]
    assert counts["bad_lines"] == 1
    assert schema.field("width").type == pa.int64()


def test_quoted_lines_across_blocks_are_one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a multi-line caption cut in two where a block ends."""
    body = "url,text\n" + "".join(f'http://a/{row},"line one\nline, two {row}\n\nend"\n' for row in range(200))
    for block in (17, 100, 1000):
        monkeypatch.setattr(delimited, "BLOCK_BYTES", block)
        counts: Counter[str] = Counter()
        batches = delimited.batches(BytesIO(body.encode()), "csv", ["url", "text"], True, counts)
        texts = [text for batch in batches for text in batch.column("text").to_pylist()]
        assert texts == [f"line one\nline, two {row}\n\nend" for row in range(200)]
        assert not counts


def test_csv_bytes_that_are_not_utf8_and_windows_line_ends(tmp_path: Path) -> None:
    """Guards against a Latin-1 caption ending the file, and against a carriage return inside the text."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfurl,text\r\nhttp://a,caf\xe9\r\nhttp://b,ok\r\n")
    store = Store(str(tmp_path / "root"))
    samples, counts = ingest(store, [path])
    assert [row["text"] for row in rows_of(store, samples)] == ["caf\ufffd", "ok"]
    assert counts["bad_encoding"] == 1


def test_headerless_cc_tables_are_told_apart(tmp_path: Path) -> None:
    """Guards against captions fetched as URLs: CC3M is caption first, CC12M is URL first; neither has quoting."""
    (tmp_path / "cc3m.tsv").write_text('a "quoted\thttp://a\n"two" dogs\thttp://b\nno address\n')
    (tmp_path / "cc12m.tsv.gz").write_bytes(gzip.compress(b"http://c\tthree\nhttp://d\tfour\n"))
    (tmp_path / "odd.tsv").write_text("http://c\thttp://d\n")
    store = Store(str(tmp_path / "root"))
    samples, counts = ingest(store, [tmp_path / "cc3m.tsv", tmp_path / "cc12m.tsv.gz"])
    pairs = [(row["url"], row["text"]) for row in rows_of(store, samples)]
    assert pairs == [("http://a", 'a "quoted'), ("http://b", '"two" dogs'), ("http://c", "three"), ("http://d", "four")]
    assert counts["bad_lines"] == 1
    with pytest.raises(SourceError, match="no header, 2 columns, of which 2"):
        ingest(Store(str(tmp_path / "other")), [tmp_path / "odd.tsv"])


def test_jsonl_with_broken_lines_and_strange_values(tmp_path: Path) -> None:
    """Guards against one bad line, or one value of another type, ending a file."""
    lines = [
        json.dumps({"url": "http://a", "text": "one", "width": 5}), "{broken", "[1, 2]", "",
        json.dumps({"url": "http://b", "text": "tw\ud800o", "width": "wide"}),
        json.dumps({"url": None, "text": "three", "width": 2**70}), json.dumps({"text": "four"}),
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    store = Store(str(tmp_path / "root"))
    samples, counts = ingest(store, [path])
    rows = rows_of(store, samples)
    assert [row["text"] for row in rows] == ["one", "tw?o", "three", "four"]
    assert [row["url"] for row in rows] == ["http://a", "http://b", None, None]
    assert (counts["bad_lines"], counts["no_url"], counts["rows_in"]) == (2, 2, 4)


def test_rows_without_an_address_stay_rows(tmp_path: Path) -> None:
    """Guards against a null URL that crashes or vanishes: it is a row, and the fetcher gives it a status."""
    store = Store(str(tmp_path / "root"))
    table = {"url": ["http://a", None, "", "  "], "text": ["x", "y", None, "z"]}
    samples, counts = ingest(store, [write_parquet(tmp_path / "a.parquet", table)])
    rows = rows_of(store, samples)
    assert [row["url"] for row in rows] == ["http://a", None, None, None]
    assert [row["key"] for row in rows] == keys_of([row["url"] for row in rows], [row["text"] for row in rows])
    assert counts["no_url"] == 3
    numbers = write_parquet(tmp_path / "n.parquet", {"url": [1, 2], "text": ["x", "y"]})
    samples, counts = ingest(Store(str(tmp_path / "other")), [numbers])
    assert counts["no_url"] == 2


def test_where_prunes_over_the_source_s_own_columns(tmp_path: Path) -> None:
    """Guards against pruning after renaming, and against null counted as true."""
    table = {"URL": ["http://a", "http://b", "http://c"], "TEXT": ["x", "y", "z"], "similarity": [0.2, 0.4, None]}
    path = write_parquet(tmp_path / "a.parquet", table)
    store = Store(str(tmp_path / "root"))
    samples, counts = ingest(store, [path], where='similarity > 0.3 AND length("TEXT") > 0')
    assert [row["text"] for row in rows_of(store, samples)] == ["y"]
    assert (counts["rows_in"], counts["pruned"], counts["samples"]) == (3, 2, 1)


def test_where_sees_laion5b_sizes_the_right_way_round(tmp_path: Path) -> None:
    """Guards against pruning by height where the recipe says width."""
    table = {"URL": ["http://a", "http://b"], "TEXT": ["x", "y"], "WIDTH": [100, 900], "HEIGHT": [900, 100],
             "similarity": [0.3, 0.3]}  # fmt: skip
    store = Store(str(tmp_path / "root"))
    samples, _ = ingest(store, [write_parquet(tmp_path / "a.parquet", table)], where="WIDTH > 500")
    assert [(row["text"], row["width"]) for row in rows_of(store, samples)] == [("x", 900)]


@pytest.mark.parametrize("where", ["widht > 3", "width", "count(*) > 1", "width > 'wide'", "1 FROM x"])
def test_a_where_that_cannot_work_fails_in_the_plan(where: str, tmp_path: Path) -> None:
    """Guards against a run that dies hours later for a misspelt column."""
    path = write_parquet(tmp_path / "a.parquet", {"url": ["http://a"], "text": ["x"], "width": [3]})
    with pytest.raises(PlanError, match=r"ingest\.where"):
        ingest(Store(str(tmp_path / "root")), [path], where=where)


def test_where_cannot_read_files(tmp_path: Path) -> None:
    """Guards against a recipe that reads what its author may not."""
    path = write_parquet(tmp_path / "a.parquet", {"url": ["http://a"], "text": ["x"]})
    with pytest.raises(PlanError):
        ingest(Store(str(tmp_path / "root")), [path], where=f"text IN (SELECT text FROM '{path}')")


def test_sources_that_name_nothing_are_refused(tmp_path: Path) -> None:
    """Guards against an empty run that looks like a finished one."""
    (tmp_path / "notes.txt").write_text("x")
    for entry in (str(tmp_path / "*.parquet"), str(tmp_path / "gone.parquet"), str(tmp_path), "http://a/x.parquet"):
        with pytest.raises(SourceError, match=r"ingest\.sources"):
            find_tables([entry])
    broken = tmp_path / "b.parquet"
    broken.write_bytes(b"PAR1 not really")
    with pytest.raises(SourceError, match="not a readable Parquet file"):
        ingest(Store(str(tmp_path / "root")), [broken])


def test_real_tables(shared: Path, tmp_path: Path) -> None:
    """Guards against tables that only our own tests write: real COYO rows, and 10,000 pairs of the web."""
    folder = shared / "realdata" / "metadata"
    store = Store(str(tmp_path / "root"))
    sources = [folder / "coyo700m_rows.csv", folder / "img2dataset_test_10000.parquet"]
    samples, counts = ingest(store, sources, rows_per_shard=3_000)
    rows = rows_of(store, samples)
    assert counts["rows_in"] == 10_008
    assert counts["samples"] == len({row["key"] for row in rows}) == len(rows)
    assert rows[0]["width"] == 600 and rows[0]["image_phash"] == "bac58374982e0fc7"
    assert [row["key"] for row in rows] == keys_of([row["url"] for row in rows], [row["text"] for row in rows])

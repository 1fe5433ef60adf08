"""The comparison: it must reward a right run, and show what a wrong one missed."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from curate.demo.compare import Finding, compare, print_findings
from curate.demo.web import TRUTH_SCHEMA, truth_table


def truth_of(rows: list[dict[str, object]]) -> pa.Table:
    """A truth table with the given columns, the rest as for a clean page."""
    usual = {
        "id": 0,
        "url": "u",
        "text": "t",
        "expected_status": ["ok"],
        "duplicate_group": None,
        "phash_distance": None,
    }
    usual |= {"content": "scene", "caption_is_true": True, "is_watermarked": False}
    return pa.Table.from_pylist([{**usual, **row} for row in rows], schema=TRUTH_SCHEMA)


@pytest.fixture
def truth() -> pa.Table:
    """Two clean pages (one listed twice), one copied page, a dead one and one with a wrong caption."""
    return truth_of(
        [
            {"key": "a", "kind": "scene"},
            {"key": "a", "kind": "repeated_row"},
            {"key": "b", "kind": "shapes"},
            {"key": "c", "kind": "scene", "duplicate_group": "g"},
            {"key": "d", "kind": "exact_copy", "duplicate_group": "g"},
            {"key": "e", "kind": "http_404", "expected_status": ["http_4xx"]},
            {"key": "f", "kind": "wrong_caption", "caption_is_true": False},
        ]
    )


def run(truth: pa.Table, kept: str, copies: dict[str, str], dead: str = "http_4xx") -> dict[str, Finding]:
    """Findings by kind of a run that selected the keys in `kept` and called `copies` duplicates."""
    keys = list("abcdef")
    status = ["ok", "ok", "ok", "ok", dead, "ok"]
    copied = pa.table(
        {"key": keys, "is_duplicate": [k in copies for k in keys], "duplicate_of": [copies.get(k) for k in keys]}
    )
    members = {"good": pa.table({"key": keys, "member": [k in kept for k in keys]})}
    images = pa.table({"key": keys, "status": status})
    return {finding.kind: finding for finding in compare(truth, pa.table({"key": keys}), images, copied, members)}


@pytest.mark.parametrize("copies", [{"d": "c"}, {"c": "d"}])
def test_right_run_is_all_right(truth: pa.Table, copies: dict[str, str]) -> None:
    """Guards against blaming a run for keeping the copy and not the original: the recipe decides which stays."""
    found = run(truth, "abc", copies)
    assert all(finding.is_right for finding in found.values())
    assert (found["repeated_row"].found, found["exact_copy"].found, found["no copy"].planted) == (1, 1, 3)


def test_faults_are_shown(truth: pa.Table) -> None:
    """Guards against a comparison that always praises."""
    found = run(truth, "acf", {"a": "b"}, dead="ok")
    wrong = {kind for kind, finding in found.items() if not finding.is_right}
    assert wrong == {"shapes", "exact_copy", "http_404", "wrong_caption", "no copy"}
    text = io.StringIO()
    print_findings(found.values(), Console(file=text, width=120))
    assert "1 false" in text.getvalue() and "1 missed" in text.getvalue()


def test_duplicate_of_a_stranger_is_no_find(truth: pa.Table) -> None:
    """Guards against counting a copy as found when it was matched with an unrelated picture."""
    assert run(truth, "abc", {"d": "b"})["exact_copy"].found == 0


def test_pruned_rows_and_no_dedup(truth: pa.Table) -> None:
    """Guards against crashes when ingest pruned rows before fetching, or the recipe has no dedup section."""
    nothing = pa.table({"key": pa.array([], pa.string()), "status": pa.array([], pa.string())})
    found = compare(truth, nothing, nothing, None, {})
    assert {finding.kind: finding.found for finding in found}["http_404"] == 0
    assert "exact_copy" not in {finding.kind for finding in found}


def test_truth_as_written_is_readable(tmp_path: Path) -> None:
    """Guards the schema between `web` and `compare`."""
    pq.write_table(truth_table([], []), tmp_path / "truth.parquet")
    assert compare(
        pq.read_table(tmp_path / "truth.parquet"), pa.table({"key": []}), pa.table({"key": [], "status": []}), None, {}
    )

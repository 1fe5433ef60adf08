"""Taking a subset's SQL apart: what is split, what is refused and in which words."""

import pyarrow as pa
import pytest

from curate.errors import PlanError
from curate.rows import columns_of
from curate.schema import IMAGES_SCHEMA, KEY, SAMPLE_FIELDS, TableSpec
from curate.select.clauses import evaluate_clauses, parse_score, split_where

SAMPLES = TableSpec("samples", 1, pa.schema([*SAMPLE_FIELDS, pa.field("width", pa.int64())]), open_schema=True)
IMAGES = TableSpec("images", 1, IMAGES_SCHEMA)
SCORES = TableSpec("scores_x", 1, pa.schema([KEY, pa.field("nsfw_score", pa.float32()), pa.field("flag", pa.bool_())]))
COLUMNS = columns_of([SAMPLES, IMAGES, SCORES])


@pytest.mark.parametrize(
    ("where", "clauses"),
    [
        ("width >= 200 AND NOT flag", [("width >= 200", ("width",)), ("NOT flag", ("flag",))]),
        ("flag AND (width > 1 AND height > 2)", [
            ("flag", ("flag",)), ("width > 1", ("width",)), ("height > 2", ("height",)),
        ]),
        ("flag OR width > 1 AND height > 2", [("flag OR ((width > 1) AND (height > 2))", ("flag", "width", "height"))]),
        ("nsfw_score BETWEEN 0.1 AND 0.3 -- why", [("nsfw_score BETWEEN 0.1 AND 0.3", ("nsfw_score",))]),
        ("source_width = width", [("source_width = width", ("source_width", "width"))]),
        ("WIDTH > 3", [("WIDTH > 3", ("width",))]),
        ("text = ') AND ('", [("\"text\" = ') AND ('", ("text",))]),
    ],
)  # fmt: skip
def test_splits_at_top_level_ands_only(where: str, clauses: list[tuple[str, tuple[str, ...]]]) -> None:
    """Guards against a BETWEEN, a bracket or a quoted AND torn apart, and reasons that name the wrong clause."""
    assert [(clause.sql, clause.columns) for clause in split_where(where, COLUMNS, "x")] == clauses


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("nsfw_scor < 0.5", "nsfw_scor is no column, did you mean nsfw_score"),
        ("flag AND wdith > 2", "subsets.a.where: wdith > 2: wdith is no column, did you mean width"),
        ("width", "gives INTEGER, expected a true-or-false condition"),
        ("nsfw_score > 'high'  AND flag > now()", "now()"),
        ("width > [1]", "Binder Error"),
        ("sum(width) > 1", "aggregates"),
        ("row_number() OVER () = 1", "window"),
        ("width IN (SELECT 1)", "subquery"),
        ("random() < 0.5", "changes from run to run"),
        ("width >", "not SQL"),
        ("flag; DROP TABLE rows", "not SQL"),
        ("flag) FROM rows; SELECT (1", "expected one SQL expression"),
        ("read_text('/etc/passwd') IS NOT NULL", "read_text"),
    ],
)
def test_refuses_in_the_plan_with_a_reason(where: str, words: str) -> None:
    """Guards against a wrong condition that is found after a week of downloads, or that differs from run to run."""
    with pytest.raises(PlanError, match=r"^subsets\.a\.where") as raised:
        split_where(where, COLUMNS, "subsets.a.where")
    assert words in str(raised.value)


def test_keep_top_needs_a_number() -> None:
    """Guards against ordering by a word."""
    assert parse_score("-nsfw_score * width", COLUMNS, "x").columns == ("nsfw_score", "width")
    with pytest.raises(PlanError, match="gives VARCHAR, expected a number"):
        parse_score("text", COLUMNS, "x")


def test_nan_is_unknown() -> None:
    """Guards against DuckDB's NaN, which is larger than every number and so passes any `score > x`."""
    rows = pa.table({"s": pa.array([0.2, float("nan"), None, 0.9], pa.float32())})
    found = evaluate_clauses(rows, ["s > 0.5", "s IS NULL"], ["s", "log(s - 0.2 + 1e-9) * 0 / 0"])
    assert found.column("0").to_pylist() == [False, None, None, True]
    assert found.column("1").to_pylist() == [False, True, True, False]
    assert found.column("3").null_count == 4

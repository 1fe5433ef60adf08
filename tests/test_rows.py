"""The wide table and SQL over it: names, sandbox, errors."""

from pathlib import Path

import pyarrow as pa
import pytest

from curate.errors import PlanError
from curate.rows import columns_of, evaluate, names_in, order, read_rows, schema_of
from curate.schema import KEY, SAMPLE_FIELDS, Shard, TableSpec, keys_of
from curate.store import Store

SAMPLES = TableSpec("samples", 1, pa.schema([*SAMPLE_FIELDS, pa.field("width", pa.int32())]), open_schema=True)
IMAGES = TableSpec("images", 1, pa.schema([KEY, pa.field("width", pa.int32())]))
TABLE = pa.table({"key": ["a", "b", "c"], "width": pa.array([3, 1, None], pa.int32()), "text": ["x'y", "", None]})


def test_computed_columns_win_and_the_sources_stay_reachable(tmp_path: Path) -> None:
    """Guards against selecting on the crawl's claim of a width where the measured one was meant."""
    store = Store(str(tmp_path))
    keys = keys_of(["u"], ["t"])
    samples = pa.table([keys, ["u"], ["t"], pa.array([9999], pa.int32())], schema=SAMPLES.schema)
    store.write(SAMPLES, Shard("s", 1), samples)
    store.write(IMAGES, Shard("s", 1), pa.table([keys, pa.array([10], pa.int32())], schema=IMAGES.schema), SAMPLES)
    columns = columns_of([SAMPLES, IMAGES])
    assert read_rows(store, columns, ["width", "source_width"], "s").to_pylist() == [
        {"key": keys[0], "width": 10, "source_width": 9999}
    ]
    assert schema_of(columns).names == ["key", "width", "url", "text", "source_width"]
    with pytest.raises(PlanError, match="written by both"):
        columns_of([SAMPLES, IMAGES, TableSpec("scores_x", 1, IMAGES.schema)])


def test_expressions_keep_row_order_and_nulls() -> None:
    """Guards against a null that passes for false, or for true."""
    assert evaluate(TABLE, {"m": "width > 1"}).column("m").to_pylist() == [True, False, None]
    assert order(TABLE, "width DESC, key") == [0, 1, 2]
    assert names_in("width * 2 DESC, key", TABLE.schema) == ["key", "width"]
    assert names_in("TRUE", TABLE.schema) == []
    assert evaluate(TABLE, {"m": "width > 1 -- wide"}).column("m").to_pylist() == [True, False, None]


@pytest.mark.parametrize(
    "expression",
    [
        "widht > 2",
        "text > 2.5",
        "read_text('/etc/hostname') = 'x'",
        "(SELECT count(*) FROM '/etc/hostname') > 0",
        "(SELECT count(*) FROM read_csv('/etc/hostname')) > 0",
        "getenv('HOME') = 'x'",
        "width > 2; DROP TABLE rows",
        "width >",
        "width; SELECT 2",
        "count(*) > 1",
        "width > avg(width) OVER ()",
        "width > (SELECT avg(width) FROM rows)",
        "unnest([width, 2]) > 1",
        "random() < 0.5",
        "now() > TIMESTAMP '2020-01-01'",
        " ",
    ],
)
def test_bad_and_hostile_expressions_are_refused(expression: str) -> None:
    """Guards against a typo found after a week of fetching, and against recipes that read files."""
    with pytest.raises(PlanError):
        names_in(expression, TABLE.schema)
        evaluate(TABLE, {"m": expression})


def test_embeddings_beside_the_columns_do_not_matter_and_can_be_asked() -> None:
    """Guards against float16 lists, which DuckDB does not take from Arrow."""
    vectors = pa.array([[1.0, 0.0], [0.0, 1.0], None], pa.list_(pa.float16(), 2))
    table = TABLE.append_column("clip_image", vectors)
    assert names_in("width DESC", table.schema) == ["width"]
    assert evaluate(table, {"m": "clip_image[1] > 0.5"}).column("m").to_pylist() == [True, False, None]
    assert order(table, "width DESC, key") == [0, 1, 2]

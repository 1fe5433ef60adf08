"""The tables of a root as DuckDB sees them."""

from pathlib import Path

import pyarrow as pa
import pytest

from curate.catalog import open_catalog
from curate.errors import StoreError
from curate.schema import SAMPLE_FIELDS, Shard, TableSpec, keys_of
from curate.store import Store

SAMPLES = TableSpec("samples", 1, pa.schema(SAMPLE_FIELDS), open_schema=True)


def test_a_root_is_read_to_the_letter(tmp_path: Path) -> None:
    """Guards against a root whose name is a pattern for DuckDB, which would answer with the rows of another root."""
    for name in ("run[1]", "run1", "run*", "runs"):
        store = Store(str(tmp_path / name))
        store.write(SAMPLES, Shard("s", 1), pa.table([keys_of([name], [""]), [name], [""]], schema=SAMPLES.schema))
    for name in ("run[1]", "run*"):
        with open_catalog(Store(str(tmp_path / name)), [SAMPLES], ["s"]) as connection:
            assert connection.sql("SELECT url FROM rows").fetchall() == [(name,)]


def test_a_damaged_file_that_only_a_query_comes_upon_is_named(tmp_path: Path) -> None:
    """Guards against a traceback of DuckDB's in `status`, and at the end of a run, for a file cut by a full disk."""
    store = Store(str(tmp_path))
    for name in ("a", "b"):
        store.write(SAMPLES, Shard(name, 1), pa.table([keys_of([name], [""]), [name], [""]], schema=SAMPLES.schema))
    with (
        pytest.raises(StoreError, match=r"b\.parquet.*delete it and run again"),
        open_catalog(store, [SAMPLES], ["a", "b"]) as connection,
    ):
        Path(store.full(store.shard_path(SAMPLES, "b"))).write_bytes(b"")
        connection.sql("SELECT max(url) FROM samples").fetchall()

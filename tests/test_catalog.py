"""The tables of a root as DuckDB sees them."""

from pathlib import Path

import pyarrow as pa

from curate.catalog import open_catalog
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

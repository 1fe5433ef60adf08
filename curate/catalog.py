"""The tables of a root as DuckDB views: what `curate sql`, `status` and reports ask.

A view per table over its committed shards, and `rows`: all tables side by side (aligned, so joined by position) for the
shards that every table has, with the names of `curate.rows`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import duckdb

from curate.errors import MissingTable, StoreError
from curate.rows import SAMPLES, columns_of
from curate.schema import TableSpec
from curate.store import Store, remedy


@contextmanager
def open_catalog(
    store: Store, tables: Sequence[TableSpec], shards: Sequence[str]
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with a view per table and, if any shard has them all, the view `rows`.

    A table without a committed shard has no view. Raises StoreError for a shard whose file cannot be read, also when a
    query in the block comes upon it: a view looks at its first file only.
    """
    try:
        with duckdb.connect() as connection:
            _add_views(connection, store, tables, shards)
            yield connection
    except (duckdb.InvalidInputException, duckdb.IOException) as error:
        cause = str(error).split("\n", maxsplit=1)[0]
        raise StoreError(f"{cause}; {remedy('a table')}; of {SAMPLES}, {remedy(SAMPLES)}") from None


def _add_views(
    connection: duckdb.DuckDBPyConnection, store: Store, tables: Sequence[TableSpec], shards: Sequence[str]
) -> None:
    if not store.is_local:
        connection.register_filesystem(store.fs)
    done = {spec.name: store.done(spec) for spec in tables}
    for spec in tables:
        have = [shard for shard in shards if shard in done[spec.name]]
        if have:
            _view(connection, spec.name, _scan(store, spec, have))
    whole = [shard for shard in shards if all(shard in names for names in done.values())]
    if whole and tables:
        joined = " POSITIONAL JOIN ".join(f"({_scan(store, spec, whole)}) AS {quoted(spec.name)}" for spec in tables)
        names = ", ".join(
            f"{quoted(column.table.name)}.{quoted(column.column)} AS {quoted(name)}"
            for name, column in columns_of(tables).items()
        )
        _view(connection, "rows", f"SELECT {names} FROM {joined}")  # names of our own tables


def find_sample(connection: duckdb.DuckDBPyConnection, key_or_url: str) -> list[str]:
    """Keys of the samples with this key or URL (one URL may stand with several texts); none in an empty pool."""
    if SAMPLES not in views_of(connection):
        return []
    found = connection.execute(
        f"SELECT DISTINCT key FROM {SAMPLES} WHERE key = ? OR url = ? ORDER BY key",
        [key_or_url, key_or_url],
    )
    return [key for (key,) in found.fetchall()]


def locate_sample(store: Store, connection: duckdb.DuckDBPyConnection, samples: TableSpec, key: str) -> tuple[str, int]:
    """(shard, row) of a key. Raises MissingTable when the pool has no such sample."""
    found = connection.execute(
        f"SELECT filename, file_row_number FROM ({_scan(store, samples, sorted(store.done(samples)), places=True)}) "
        "WHERE key = ?",
        [key],
    ).fetchone()
    if found is None:
        raise MissingTable(f"no sample {key} under {store.root}")
    return str(found[0]).rsplit("/", 1)[-1].removesuffix(".parquet"), int(found[1])


def count_by(connection: duckdb.DuckDBPyConnection, table: str, expression: str) -> Mapping[str, int]:
    """Rows per value of an expression, commonest first."""
    rows = connection.execute(
        f"SELECT CAST(({expression}) AS VARCHAR) AS what, count(*) AS n FROM {table} GROUP BY 1 ORDER BY n DESC, what"
    )
    return {str(what): int(count) for what, count in rows.fetchall()}


def _view(connection: duckdb.DuckDBPyConnection, name: str, query: str) -> None:
    try:
        connection.execute(f"CREATE VIEW {quoted(name)} AS {query}")
    except (duckdb.InvalidInputException, duckdb.IOException) as error:
        cause = str(error).split("\n", maxsplit=1)[0]
        raise StoreError(f"{cause}; {remedy(name)}") from None


def views_of(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Names of the views that a catalog has."""
    found = connection.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal ORDER BY 1").fetchall()
    return [name for (name,) in found]


def quoted(name: str) -> str:
    """A name as SQL writes it; a source's columns may be called anything."""
    return '"' + name.replace('"', '""') + '"'


def literal(path: str) -> str:
    """A path for read_parquet, which would take `run[1]` for a pattern, and read the run beside it in `run1`."""
    return re.sub(r"[\[*?]", r"[\g<0>]", path)


def _scan(store: Store, spec: TableSpec, shards: Sequence[str], places: bool = False) -> str:
    files = [_path(store, spec, shard).replace("'", "''") for shard in shards]
    listed = ", ".join(f"'{file}'" for file in files)
    extra = ", filename = true, file_row_number = true" if places else ""
    names = ", ".join(quoted(name) for name in spec.schema.names)
    chosen = "*" if spec.open_schema or places else names
    return f"SELECT {chosen} FROM read_parquet([{listed}], union_by_name = {spec.open_schema}{extra})"


def _path(store: Store, spec: TableSpec, shard: str) -> str:
    path = store.full(store.shard_path(spec, shard))
    if store.is_local:
        return literal(path)
    protocol = store.fs.protocol if isinstance(store.fs.protocol, str) else store.fs.protocol[0]
    return f"{protocol}://{path}"

"""A shard's tables seen as one wide table, and SQL over it: what selection, keeping orders and explanations read.

Names: every column under its own name. Where the source came with a column that a stage computed too (COYO's `width`),
the computed one has the name and the source's is `source_<name>`. `member` and `reason` of a table `member_<subset>`
are `member_<subset>` and `reason_<subset>`. Two computed tables must not share a column.
Expressions are DuckDB's SQL over one row at a time; they cannot reach files or the network.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from curate.errors import PlanError, StoreError
from curate.schema import KEY, Shard, TableSpec, pool_digest
from curate.store import Store

SAMPLES = "samples"
MEMBER = "member_"
_NOT_OF_A_ROW = """
    SELECT function_name FROM duckdb_functions() GROUP BY 1
    HAVING NOT bool_or(function_type IN ('scalar', 'macro') AND coalesce(stability, 'CONSISTENT') = 'CONSISTENT')
"""


@dataclass(frozen=True)
class Column:
    """A name of the wide table and where it comes from."""

    name: str
    table: TableSpec
    column: str

    @property
    def type(self) -> pa.DataType:
        """Arrow type."""
        return self.table.schema.field(self.column).type


def clauses_path(member: TableSpec, shards: Sequence[Shard]) -> str:
    """Where it stands how often each clause of a subset is true, false and unknown in these shards."""
    return f"_clauses/{member.fingerprint}-{pool_digest(shards)}.json"


def recall_path(duplicates: TableSpec) -> str:
    """Where it stands how many near pairs of a sample the searches of a table of copies found."""
    return f"{duplicates.name}/{duplicates.fingerprint}/_recall.json"


def columns_of(tables: Sequence[TableSpec]) -> dict[str, Column]:
    """Every name of the wide table, in table order. Raises PlanError when two computed tables share a column."""
    columns = {KEY.name: Column(KEY.name, tables[0], KEY.name)}
    for spec in sorted(tables, key=lambda spec: spec.name == SAMPLES):  # computed names first: they win
        for name in spec.columns:
            if spec.name.startswith(MEMBER):
                wide = f"{name}_{spec.name.removeprefix(MEMBER)}"
                columns[wide] = Column(wide, spec, name)
                continue
            held = columns.get(name)
            if held is None:
                columns[name] = Column(name, spec, name)
            elif spec.name == SAMPLES:
                columns[f"source_{name}"] = Column(f"source_{name}", spec, name)
            else:
                raise PlanError(
                    f"column {name} is written by both {held.table.name} and {spec.name}; rename one scorer"
                )
    return columns


def schema_of(columns: Mapping[str, Column]) -> pa.Schema:
    """The wide table's schema."""
    return pa.schema([pa.field(column.name, column.type) for column in columns.values()])


def read_rows(store: Store, columns: Mapping[str, Column], names: Sequence[str], shard: str) -> pa.Table:
    """`key` and the named columns of a shard, in the order asked for.

    Raises MissingTable, and StoreError when tables of the shard do not hold the same keys in the same order.
    """
    wanted = [columns[name] for name in dict.fromkeys(names) if name != KEY.name]
    specs = list({column.table.name: column.table for column in wanted}.values()) or [columns[KEY.name].table]
    arrays: dict[str, pa.ChunkedArray] = {}
    for spec in specs:
        mine = [column for column in wanted if column.table is spec]
        table = store.read(spec, shard, [KEY.name, *(column.column for column in mine)])
        if not arrays.setdefault(KEY.name, table.column(KEY.name)).equals(table.column(KEY.name)):
            raise StoreError(
                f"{shard}: {spec.name} and {specs[0].name} are not aligned: their keys differ; a file of one of them "
                f"was put there by hand: delete it and run again ({store.url(store.shard_path(spec, shard))})"
            )
        for column in mine:
            arrays[column.name] = table.column(column.column)
    return pa.table({name: arrays[name] for name in dict.fromkeys([KEY.name, *names])})


def connect() -> duckdb.DuckDBPyConnection:
    """A DuckDB that can see nothing but what is registered with it."""
    connection = duckdb.connect(config={"threads": "1", "enable_external_access": "false"})
    connection.execute("SET python_enable_replacements=false")
    return connection


def evaluate(table: pa.Table, expressions: Mapping[str, str]) -> pa.Table:
    """Each expression for each row, in row order. Raises PlanError with DuckDB's words when one does not bind."""
    chosen = ", ".join(f'({text}\n) AS "{name}"' for name, text in expressions.items())  # a text may end in a comment
    with connect() as connection:
        connection.register("rows", readable(table))
        try:
            return connection.sql(f"SELECT {chosen} FROM rows").to_arrow_table()  # the recipe's own SQL
        except duckdb.Error as error:
            raise PlanError(f"in {chosen}: {_first_lines(error)}") from None


def order(table: pa.Table, ordering: str) -> list[int]:
    """Row numbers in the order of an SQL ordering, e.g. `width * height DESC, key`. Raises PlanError."""
    with connect() as connection:
        numbers = pa.array(range(table.num_rows), pa.int64())
        connection.register("numbered", readable(table).append_column("row_number_", numbers))
        try:
            found = connection.sql(f"SELECT row_number_ FROM numbered ORDER BY {ordering}")
            return [row for (row,) in found.fetchall()]
        except duckdb.Error as error:
            raise PlanError(f"in keep: {ordering}: {_first_lines(error)}") from None


def names_in(expression: str, schema: pa.Schema) -> list[str]:
    """The columns that an expression (or an ordering) reads. Raises PlanError for an unknown one, with near names.

    Checked by binding it against an empty table, so that types are checked as well. Refused too: what looks beyond its
    row (aggregates, windows, subqueries: they would see one shard) and what answers anew each time (random(), now()).
    """
    if not expression.strip():
        raise PlanError("an expression is empty; leave it out where it is to say nothing")
    empty = readable(schema.empty_table())
    query = f"SELECT 1 FROM rows ORDER BY {expression}"
    with connect() as connection:
        connection.register("rows", empty)
        connection.execute("SET order_by_non_integer_literal=true")  # TRUE is an expression, though no ordering
        try:
            if len(connection.extract_statements(query)) != 1:
                raise PlanError(f"{expression}: more than one statement; write one expression")
            plan = connection.execute(f"EXPLAIN {query}")
            plan.fetchall()
        except duckdb.Error as error:
            raise PlanError(f"{expression}: {_first_lines(error)}; columns: {', '.join(schema.names)}") from None
        parsed = connection.execute("SELECT json_serialize_sql(?)", [query])
        (tree,) = parsed.fetchall()[0]
        nodes = list(_nodes(json.loads(tree)))
        called = {node["function_name"].lower() for node in nodes if node["class"] == "FUNCTION"}
        foreign = sorted(called & {"unnest", *(name for (name,) in connection.execute(_NOT_OF_A_ROW).fetchall())})
    foreign += sorted({node["class"].lower() for node in nodes} & {"window", "subquery"})
    if foreign:
        raise PlanError(f"{expression}: {foreign[0]} is no function of a row alone; use what gives a row one value")
    used = {node["column_names"][-1].lower() for node in nodes if node["class"] == "COLUMN_REF"}  # they know no case
    return [name for name in schema.names if name.lower() in used]


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """The expressions in DuckDB's syntax tree."""
    if isinstance(tree, list):
        for child in tree:
            yield from _nodes(child)
    elif isinstance(tree, dict):
        if isinstance(tree.get("class"), str):
            yield tree
        for child in tree.values():
            yield from _nodes(child)


def readable(table: pa.Table) -> pa.Table:
    """The same for DuckDB, which takes no float16 and no decimal above 38 digits from Arrow: as float32 and float64."""
    for at, field in enumerate(table.schema):
        if pa.types.is_fixed_size_list(field.type) and pa.types.is_float16(field.type.value_type):
            wide = table.column(at).cast(pa.list_(pa.float32(), field.type.list_size))
            table = table.set_column(at, field.name, wide)
        elif pa.types.is_float16(field.type):
            table = table.set_column(at, field.name, table.column(at).cast(pa.float32()))
        elif pa.types.is_decimal256(field.type):
            table = table.set_column(at, field.name, table.column(at).cast(pa.float64()))
    return table


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n\n", maxsplit=1)[0].split())

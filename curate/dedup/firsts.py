"""The first row of each group in a shard stands for the others there, until it is decided which row of all stays.

    <rule>/local/<shard>.npz    `row`: rows that are not the first of their group in the shard, `first`: the row that is

So a group that is half of the pool brings one row of each shard together, not half of the pool. What a first row
carries of its value (`payload_`: a hash, a vector) comes back from the row that stays, to say how similar they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.across import ROW, verdicts_on
from curate.dedup.rules import Rule
from curate.errors import PlanError
from curate.rows import read_rows, readable
from curate.store import Store
from curate.vectors import get_arrays, matrix, put_arrays

PAYLOAD = pa.field("payload_", pa.binary())
COUNT = pa.field("count_", pa.int64())  # rows of the group in the shard
GONE = pa.field("gone_", pa.bool_())  # False: the row that stays


def row_bytes(rule: Rule) -> int:
    """About the size of a candidate of a rule among the pool's own rows."""
    kind = rule.columns[rule.values[0]].type
    return 64 + (kind.list_size * (kind.value_type.bit_width // 8) if rule.search == "vectors" else 0)


def order_of(keep: str) -> str:
    """The whole ordering of a group: what was released, the recipe's order, the key."""
    return f"released_ DESC, {keep}, key"


@contextmanager
def ordering_errors(keep: str) -> Iterator[None]:
    """Raise PlanError for an ordering that DuckDB refuses."""
    try:
        yield
    except duckdb.Error as error:
        cause = " ".join(str(error).split("\n\n", maxsplit=1)[0].split())
        raise PlanError(
            f"keep: {keep}: {cause}; expected an ordering that holds for every row, e.g. with TRY_CAST"
        ) from None


def payload_of(rule: Rule, table: pa.Table) -> pa.Array:
    """What similarity is computed from: the bytes of each row's hash or vector; null for what must be equal."""
    column = table[rule.values[0]]
    if rule.search == "exact":
        return pa.nulls(table.num_rows, PAYLOAD.type)
    if rule.search == "hashes":
        return pa.array([bytes.fromhex(text) for text in column.to_pylist()], PAYLOAD.type)
    vectors = np.ascontiguousarray(matrix(column)[0])
    return pa.array([vector.tobytes() for vector in vectors], PAYLOAD.type)


def firsts_here(store: Store, rule: Rule, shard: str, rows: pa.Table) -> pa.Table:
    """The first candidate of each value, with how many there are; leaves word of the others."""
    query = f"""
        SELECT *, count(*) OVER (PARTITION BY value_) AS count_, first_value(row_) OVER w AS first_
        FROM candidates WINDOW w AS (PARTITION BY value_ ORDER BY {order_of(rule.settings.keep)}, row_) ORDER BY row_
        """
    with duckdb.connect(config={"threads": "1"}) as connection, ordering_errors(rule.settings.keep):
        connection.register("candidates", readable(rows))
        found = connection.sql(query).to_arrow_table()
    first = pc.equal(found[ROW.name], found["first_"])
    others = found.filter(pc.invert(first))
    put_arrays(
        store, f"{rule.work}/local/{shard}.npz", row=others[ROW.name].to_numpy(), first=others["first_"].to_numpy()
    )
    chosen = found.filter(first).drop_columns(["first_"])
    return chosen.cast(pa.schema([*rows.schema, COUNT]))


def rows_removed(store: Store, rule: Rule, shard: str) -> pa.Array:
    """Numbers of the rows of a shard that the rule removed."""
    decided = _decided(store, rule, shard)
    return decided.filter(decided[GONE.name])[ROW.name].combine_chunks()


def verdicts_of(store: Store, rule: Rule, shard: str) -> pa.Table:
    """What was decided of a shard's rows, those that stay for others included (`gone_` is false)."""
    decided = _decided(store, rule, shard)
    if not _own_copies(rule) or not decided.num_rows:
        return decided
    at = decided.schema.get_field_index("similarity_")
    return decided.set_column(at, decided.schema.field(at), pa.array(_similarity(store, rule, shard, decided)))


def _own_copies(rule: Rule) -> bool:
    return rule.reference is None and not rule.semdedup


def _decided(store: Store, rule: Rule, shard: str) -> pa.Table:
    back = verdicts_on(store, rule.work, shard)
    if not _own_copies(rule):
        return back
    local = get_arrays(store, f"{rule.work}/local/{shard}.npz")
    at = np.searchsorted(back[ROW.name].to_numpy(), local["first"])
    others = back.take(pa.array(at, pa.int64()))
    for field, values in ((ROW, pa.array(local["row"], ROW.type)), (GONE, pa.array([True] * len(at), GONE.type))):
        others = others.set_column(others.schema.get_field_index(field.name), field, values)
    return pa.concat_tables([back, others]).sort_by(ROW.name)


def _similarity(store: Store, rule: Rule, shard: str, decided: pa.Table) -> npt.NDArray[np.float32]:
    """Of each row to the one that stays."""
    if rule.search == "exact":
        return np.ones(decided.num_rows, np.float32)
    column = read_rows(store, rule.columns, [rule.values[0]], shard)[rule.values[0]].take(decided[ROW.name])
    kept = b"".join(decided[PAYLOAD.name].to_pylist())
    if rule.search == "hashes":
        mine = b"".join(bytes.fromhex(text) for text in column.to_pylist())
        bits = np.bitwise_count(np.frombuffer(mine, np.uint64) ^ np.frombuffer(kept, np.uint64))
        return np.asarray(1 - bits / 64, np.float32)
    vectors = matrix(column)[0]
    both: Any = np.concatenate([vectors, np.frombuffer(kept, vectors.dtype).reshape(vectors.shape)])
    place = np.arange(len(vectors))
    wide = both if both.dtype == np.float16 else both.astype(np.float32)
    from curate.dedup.cosine_block import Block  # noqa: PLC0415  # torch: where vectors are compared

    return Block(wide, 0.0, "cpu", cut=False).cosine(place, place + len(vectors))

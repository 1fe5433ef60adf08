"""Who takes part in a rule: rows that have an image and a value, and that no earlier rule removed."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.across import ROW
from curate.dedup.firsts import rows_removed
from curate.dedup.hamming_tables import HashArray
from curate.dedup.near import IntArray, VectorArray
from curate.dedup.near_hashes import hashes_of
from curate.dedup.rules import Rule
from curate.rows import read_rows
from curate.schema import OK
from curate.store import Store
from curate.vectors import matrix


def taking_part(store: Store, rule: Rule, names: Sequence[str], before: Sequence[Rule], shard: str) -> pa.Table:
    """`key`, `status`, `row_` (the number in the shard) and the named columns of the rows that take part."""
    asked = dict.fromkeys(["status", rule.values[0], *names])
    table = read_rows(store, rule.columns, list(asked), shard)
    table = table.append_column(ROW, pa.array(range(table.num_rows), ROW.type))
    mask = pc.equal(table["status"], OK)
    mask = pc.and_(mask, pc.is_valid(table[rule.values[0]]))  # (pHash, null text) is a pair, a null pHash is nothing
    for earlier in before:
        gone = rows_removed(store, earlier, shard)
        mask = pc.and_(mask, pc.invert(pc.is_in(table[ROW.name], gone)))
    return table.filter(pc.fill_null(mask, False))


def hashes_on(store: Store, rule: Rule, before: Sequence[Rule], shard: str) -> tuple[HashArray, IntArray]:
    """(uint64 hashes, row numbers) of the rows of a shard that take part."""
    table = taking_part(store, rule, [], before, shard)
    return hashes_of(table[rule.values[0]].to_pylist()), table[ROW.name].to_numpy()


def vectors_on(store: Store, rule: Rule, before: Sequence[Rule], shard: str) -> tuple[VectorArray, IntArray]:
    """(float16 or float32 [n, d], row numbers) of the rows of a shard that take part."""
    table = taking_part(store, rule, [], before, shard)
    vectors, _ = matrix(table[rule.values[0]])
    return np.asarray(vectors, dtype_of(rule)), table[ROW.name].to_numpy()


def dtype_of(rule: Rule) -> str:
    """Of the rule's vectors: float16 as stored, anything wider as float32."""
    return "float16" if pa.types.is_float16(rule.columns[rule.values[0]].type.value_type) else "float32"

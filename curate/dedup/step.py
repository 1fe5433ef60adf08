"""Copies across all shards: one of each group stays, and every other row says which, why and by what rule.

Rules are applied in the order of the recipe, each to the rows that the rules before it left. A rule spills its values
by hash into partitions, decides in each partition, and scatters the verdicts back to the shards:

    _work/duplicates/<fingerprint>/<rule>/spill/<shard>/<partition>.parquet
    _work/duplicates/<fingerprint>/<rule>/verdict/<partition>.parquet
    _work/duplicates/<fingerprint>/<rule>/state/<shard>.parquet

Every file is written whole, and one that is there is not made again: killed anywhere, a second run gives the same rows.
Only rows with an image (status ok) take part.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.config import DedupSettings
from curate.dedup.near import Near, group_hashes, hashes_of, read_groups
from curate.errors import PlanError
from curate.metrics import Ticker
from curate.rows import Column, columns_of, names_in, read_rows, schema_of
from curate.schema import KEY, OK, Shard, TableSpec, inputs_of, pool_digest
from curate.stage import CrossStep, Map
from curate.store import Store

ROWS_PER_PARTITION = 4_000_000  # 64 bytes a row with a usual keep order: a quarter GiB in the deciding process
HASH_BITS = 64
SHARDS_PER_SCATTER = 200  # verdict files are read once per this many shards

# What a rule compares: the columns whose values must all be equal.
EXACT = {
    "sha256": ("sha256",),
    "image_phash": ("image_phash",),
    "image_phash_text": ("image_phash", "text"),
}

_FIELDS = (
    pa.field("is_duplicate", pa.bool_(), nullable=False),
    pa.field("duplicate_of", pa.string()),  # key of the row that was kept instead
    pa.field("duplicate_kind", pa.string()),  # the rule: sha256, image_phash, …
    pa.field("duplicate_similarity", pa.float32()),  # to its nearest in the group; 1: equal, less a 64th per bit
    pa.field("duplicate_reason", pa.string()),
)


@dataclass(frozen=True)
class _Rule:
    """A rule with everything a worker needs to apply it to a shard."""

    number: int
    settings: DedupSettings
    columns: Mapping[str, Column]
    keep_columns: tuple[str, ...]
    partitions: int

    @property
    def values(self) -> tuple[str, ...]:
        """Columns that must be equal, or nearly."""
        return EXACT[self.settings.by]

    @property
    def words(self) -> str:
        """What the rows of a group share, for people."""
        same = " and ".join(self.values)
        return f"same {same}" if not self.settings.radius else f"{same} within {self.settings.radius} bits"


class DedupStep(CrossStep):
    """See the module's docstring. Writes the table `duplicates`."""

    name = "dedup"

    def __init__(self, rules: Sequence[DedupSettings], tables: Sequence[TableSpec], shards: Sequence[Shard]) -> None:
        columns = columns_of(tables)
        schema = schema_of(columns)
        rows = sum(shard.rows for shard in shards)
        self._rules: list[_Rule] = []
        for number, rule in enumerate(rules):
            needed = EXACT.get(rule.by)
            if needed is None:
                raise PlanError(f"dedup.{number}.by: {rule.by!r} is not one of {', '.join(EXACT)}")
            if rule.radius and rule.by != "image_phash":
                raise PlanError(f"dedup.{number}.radius: only image_phash has one; {rule.by} compares exactly")
            for name in needed:
                if name not in columns:
                    raise PlanError(
                        f"dedup.{number}.by: {rule.by} needs the column {name}, which no table has; "
                        "add the scorer that writes it, e.g. score: {phash: {scorer: phash}}"
                    )
            keep = tuple(names_in(rule.keep, schema))
            self._rules.append(_Rule(number, rule, columns, keep, max(1, -(-rows // ROWS_PER_PARTITION))))
        used = {columns[name].table.name: columns[name].table for name in self._names(columns)}
        self._spec = TableSpec(
            "duplicates", 1, pa.schema([KEY, *_FIELDS]),
            settings={"rules": [rule.model_dump(mode="json") for rule in rules], "pool": pool_digest(shards)},
            inputs=inputs_of(used.values()),
        )  # fmt: skip
        self._any = tables[0]
        self.tables = (self._spec,)

    def _names(self, columns: Mapping[str, Column]) -> list[str]:
        names = {"status"}
        for rule in self._rules:
            names.update(rule.values, rule.keep_columns)
        return sorted(names & set(columns))

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every shard has its verdicts."""
        return {shard.name for shard in shards} <= store.done(self._spec)

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Apply the rules in order; counts duplicates by rule."""
        work = f"_work/duplicates/{self._spec.fingerprint}"
        names = [shard.name for shard in shards]
        for rule in self._rules:
            here, before = f"{work}/{rule.number}", f"{work}/{rule.number - 1}" if rule.number else None
            if rule.settings.radius:
                firsts = accumulate((shard.rows for shard in shards[:-1]), initial=0)
                candidates = partial(_hashes, store, rule, before)
                near = Near(store, here, candidates, rule.settings.radius, tuple(names), tuple(firsts))
                group_hashes(near, shards, map_items)
            done = set(store.names(f"{here}/done"))
            spill = partial(_spill, store, rule, here, before)
            for _ in map_items(spill, [name for name in names if f"{name}.json" not in done]):
                pass
            decided = set(store.names(f"{here}/verdict"))
            todo = [number for number in range(rule.partitions) if f"{number:05d}.parquet" not in decided]
            for _ in map_items(partial(_decide, store, rule, here, names), todo):
                pass
            groups = [shards[at : at + SHARDS_PER_SCATTER] for at in range(0, len(shards), SHARDS_PER_SCATTER)]
            for _ in map_items(partial(_scatter, store, rule, here, before, names), groups):
                pass
        last = f"{work}/{self._rules[-1].number}" if self._rules else None
        counts: Counter[str] = Counter()
        for count in map_items(partial(_commit, store, self._spec, self._any, last), list(shards)):
            counts.update(count)
            ticker.advance(1)
        store.remove_tree(work)
        return counts


def dedup_step(rules: Sequence[DedupSettings], tables: Sequence[TableSpec], shards: Sequence[Shard]) -> DedupStep:
    """The step for these rules over these tables. Raises PlanError for an unknown rule or column."""
    return DedupStep(rules, tables, shards)


def _state(store: Store, folder: str | None, shard: str, rows: int) -> pa.Table:
    """What earlier rules said of a shard's rows."""
    if folder is None:
        nulls = [pa.nulls(rows, field.type) for field in _FIELDS[1:]]
        return pa.table([pa.array([False] * rows, pa.bool_()), *nulls], schema=pa.schema(_FIELDS))
    with store.open(f"{folder}/state/{shard}.parquet") as handle:
        return pq.read_table(handle)


def _put(store: Store, path: str, table: pa.Table) -> None:
    with store.staged(path) as local:
        pq.write_table(table, local, compression="zstd")


def _candidates(store: Store, rule: _Rule, names: Sequence[str], before: str | None, shard: str) -> pa.Table:
    """Rows that have an image and a value, and that no earlier rule removed; `row_` is their number in the shard."""
    table = read_rows(store, rule.columns, list(dict.fromkeys(["status", *names])), shard)
    state = _state(store, before, shard, table.num_rows)
    table = table.append_column("row_", pa.array(range(table.num_rows), pa.int64()))
    mask = pc.and_(pc.equal(table["status"], OK), pc.invert(state["is_duplicate"]))
    mask = pc.and_(mask, pc.is_valid(table[rule.values[0]]))  # (pHash, null text) is a pair, a null pHash is nothing
    return table.filter(pc.fill_null(mask, False))


def _hashes(store: Store, rule: _Rule, before: str | None, shard: str) -> tuple[Any, Any]:
    """(uint64 hashes, row numbers) of a shard's candidates."""
    table = _candidates(store, rule, rule.values, before, shard)
    return hashes_of(table[rule.values[0]].to_pylist()), table["row_"].to_numpy()


def _spill(store: Store, rule: _Rule, folder: str, before: str | None, shard: str) -> None:
    """Deal a shard's candidate rows into partitions by the hash of what the rule compares, or by their group."""
    table = _candidates(store, rule, [*rule.values, *rule.keep_columns], before, shard)
    if rule.settings.radius:
        rows, groups, distance = read_groups(store, folder, shard)
        table = table.filter(pc.is_in(table["row_"], pa.array(rows)))
        values: list[Any] = groups.tolist()
        similarity = 1 - distance.astype(np.float32) / HASH_BITS
    else:
        values = list(zip(*(table[name].to_pylist() for name in rule.values), strict=True))
        similarity = np.ones(len(values), np.float32)
    digests = [hashlib.blake2b(repr(value).encode(), digest_size=16).digest() for value in values]
    parts = [int.from_bytes(digest[:4], "big") % rule.partitions for digest in digests]
    table = table.select([KEY.name, "row_", *(name for name in rule.keep_columns if name != KEY.name)])
    table = table.append_column("value_", pa.array(digests, pa.binary(16)))
    table = table.append_column("similarity_", pa.array(similarity, pa.float32()))
    table = table.append_column("partition_", pa.array(parts, pa.int32()))
    for number in sorted(set(parts)):
        chosen = table.filter(pc.equal(table["partition_"], number)).drop_columns(["partition_"])
        _put(store, f"{folder}/spill/{number:05d}/{shard}.parquet", chosen)
    store.put_json(f"{folder}/done/{shard}.json", {"rows": table.num_rows})


def _decide(store: Store, rule: _Rule, folder: str, shards: Sequence[str], number: int) -> None:
    """In a partition, keep the first of each group by the rule's ordering."""
    place = f"{folder}/spill/{number:05d}"
    numbers = {name: at for at, name in enumerate(shards)}
    parts = []
    for name in store.names(place):
        with store.open(f"{place}/{name}") as handle:
            part = pq.read_table(handle)
        at = numbers[name.removesuffix(".parquet")]
        parts.append(part.append_column("shard_", pa.array([at] * part.num_rows, pa.int64())))
    verdict = _verdicts(pa.concat_tables(parts), rule.settings.keep) if parts else _NO_VERDICT.empty_table()
    _put(store, f"{folder}/verdict/{number:05d}.parquet", verdict)


_NO_VERDICT = pa.schema(
    [("shard_", pa.int64()), ("row_", pa.int64()), ("kept", pa.string()), ("similarity_", pa.float32())]
)


def _verdicts(rows: pa.Table, keep: str) -> pa.Table:
    """(shard, row, key kept instead) of every row that is not the first of its group."""
    with duckdb.connect(config={"threads": "1"}) as connection:
        connection.register("candidates", rows)
        found = connection.sql(
            f"""
            WITH grouped AS (
              SELECT * FROM candidates
              WHERE value_ IN (SELECT value_ FROM candidates GROUP BY value_ HAVING count(*) > 1)
            ), ranked AS (
              SELECT shard_, row_, key, similarity_,
                first_value(key) OVER w AS kept, row_number() OVER w AS place
              FROM grouped WINDOW w AS (PARTITION BY value_ ORDER BY {keep}, key, shard_, row_)
            )
            SELECT shard_, row_, kept, similarity_ FROM ranked WHERE place > 1 ORDER BY shard_, row_
            """  # the recipe's own ordering, already bound against the schema
        ).to_arrow_table()
    return found.cast(_NO_VERDICT)


def _scatter(
    store: Store, rule: _Rule, folder: str, before: str | None, pool: Sequence[str], shards: Sequence[Shard]
) -> None:
    """Give a group of shards the verdicts on their rows."""
    order = {name: at for at, name in enumerate(pool)}
    places = [order[shard.name] for shard in shards]
    first, last = min(places), max(places)
    verdicts = []
    for part in store.names(f"{folder}/verdict"):
        with store.open(f"{folder}/verdict/{part}") as handle:
            verdicts.append(pq.read_table(handle, filters=[("shard_", ">=", first), ("shard_", "<=", last)]))
    verdict = pa.concat_tables(verdicts)
    for shard in shards:
        state = _state(store, before, shard.name, shard.rows)
        mine = verdict.filter(pc.equal(verdict["shard_"], order[shard.name]))
        _put(store, f"{folder}/state/{shard.name}.parquet", _apply(rule, state, mine))


def _apply(rule: _Rule, state: pa.Table, verdict: pa.Table) -> pa.Table:
    rows: list[dict[str, Any]] = state.to_pylist()
    told = (verdict[name].to_pylist() for name in ("row_", "kept", "similarity_"))
    for row, kept, similarity in zip(*told, strict=True):
        rows[row] = {
            "is_duplicate": True, "duplicate_of": kept, "duplicate_kind": rule.settings.by,
            "duplicate_similarity": similarity,
            "duplicate_reason": f"{rule.words} as {kept}, which is first by {rule.settings.keep}",
        }  # fmt: skip
    return pa.Table.from_pylist(rows, schema=pa.schema(_FIELDS))


def _commit(store: Store, spec: TableSpec, aligned: TableSpec, folder: str | None, shard: Shard) -> dict[str, int]:
    state = _state(store, folder, shard.name, shard.rows)
    keys = store.read(aligned, shard.name, [KEY.name]).column(KEY.name)
    store.write(spec, shard, pa.table([keys, *state.columns], schema=spec.schema), aligned_with=aligned)
    counts = Counter(state.column("duplicate_kind").drop_null().to_pylist())
    return {f"duplicate by {kind}": count for kind, count in counts.items()}

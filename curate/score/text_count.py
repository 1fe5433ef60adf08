"""How often a text stands in the pool: the one score that looks across shards.

COYO drops texts that appear more than 10 times, ALIGN those on more than 10 images. Texts are compared as COYO compares
them: runs of white space collapsed, ends stripped. Null texts have no count.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from curate.across import ROW, SHARD, VALUE, decide_across, verdicts_on
from curate.errors import ConfigError
from curate.metrics import Ticker
from curate.schema import KEY, Shard, TableSpec, inputs_of, pool_digest
from curate.stage import CrossStep, Map
from curate.store import Store

SCORER = "text_count"
COLUMN = pa.field("text_count", pa.int64())


def is_text_count(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of `score:` is counted across shards rather than scored shard by shard."""
    return entry.get("scorer") == SCORER


def text_count_steps(
    section: Mapping[str, Mapping[str, Any]], samples: TableSpec, shards: Sequence[Shard]
) -> list["TextCountStep"]:
    """The steps for the entries of `score:` with `scorer: text_count`. Raises ConfigError for unknown keys."""
    return [TextCountStep(name, entry, samples, shards) for name, entry in section.items() if is_text_count(entry)]


class TextCountStep(CrossStep):
    """Writes `scores_<name>` with `text_count`: rows of the pool with the same text, this one included."""

    name = SCORER

    def __init__(self, name: str, entry: Mapping[str, Any], samples: TableSpec, shards: Sequence[Shard]) -> None:
        unknown = sorted(set(entry) - {"scorer"})
        if unknown:
            raise ConfigError(f"score.{name}.{unknown[0]}: unknown key; {SCORER} has no settings")
        settings = {"pool": pool_digest(shards)}
        schema = pa.schema([KEY, COLUMN])
        self._samples = samples
        self._spec = TableSpec(f"scores_{name}", 1, schema, settings, inputs_of([samples]))
        self.tables = (self._spec,)

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every shard has its counts."""
        return {shard.name for shard in shards} <= store.done(self._spec)

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Count; returns how many rows have a text that stands more than once."""
        work = f"_work/{self._spec.name}/{self._spec.fingerprint}"
        decide_across(store, work, shards, map_items, partial(_texts, store, self._samples), _repeated)
        counts: Counter[str] = Counter()
        for repeated in map_items(partial(_commit, store, self._spec, self._samples, work), list(shards)):
            counts["rows with a repeated text"] += repeated
            ticker.advance(1)
        store.remove_tree(work)
        return counts


def _texts(store: Store, samples: TableSpec, shard: str) -> pa.Table:
    texts = store.read(samples, shard, [KEY.name, "text"]).column("text")
    rows = pa.array(range(len(texts)), ROW.type)
    values = [
        None if text is None else hashlib.blake2b(" ".join(text.split()).encode("utf-8", "replace"), digest_size=16)
        for text in texts.to_pylist()
    ]
    digests = pa.array([None if value is None else value.digest() for value in values], VALUE.type)
    table = pa.table([rows, digests], schema=pa.schema([ROW, VALUE]))
    return table.filter(pc.is_valid(table[VALUE.name]))


def _repeated(rows: pa.Table) -> pa.Table:
    """(shard, row, count) of every row whose text stands more than once."""
    with duckdb.connect(config={"threads": "1"}) as connection:
        connection.register("texts", rows)
        found = connection.sql(
            "SELECT shard_, row_, text_count FROM (SELECT shard_, row_, count(*) OVER (PARTITION BY value_) AS "
            "text_count FROM texts) WHERE text_count > 1 ORDER BY shard_, row_"
        ).to_arrow_table()
    return found.cast(pa.schema([SHARD, ROW, COLUMN]))


def _commit(store: Store, spec: TableSpec, samples: TableSpec, work: str, shard: Shard) -> int:
    table = store.read(samples, shard.name, [KEY.name, "text"])
    counts: list[int | None] = [None if text is None else 1 for text in table.column("text").to_pylist()]
    verdicts = verdicts_on(store, work, shard.name)
    for row, count in zip(verdicts[ROW.name].to_pylist(), verdicts[COLUMN.name].to_pylist(), strict=True):
        counts[row] = count
    if not store.has(spec, shard.name):  # of two runs at once the slower writes nothing over the faster
        store.write(spec, shard, pa.table([table.column(KEY.name), counts], schema=spec.schema), aligned_with=samples)
    return int(verdicts.num_rows)

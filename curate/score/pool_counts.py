"""Scores that look across shards: how often a row's text or URL stands in the pool, and words that are rare in it.

    text_count   rows with the same text: COYO drops those above 10, ALIGN texts on more than 10 images
    url_count    rows with the same URL, which are its texts: ALIGN drops images with more than 1,000
    rare_words   see `curate.score.rare_words`

Texts are compared as COYO compares them: runs of white space collapsed, ends stripped. Null texts have no count. A pool
holds a pair (url, text) once, so that the rows of a text are its images, and the rows of a URL its texts.
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
from curate.score.rare_words import RareWordsStep
from curate.stage import CrossStep, Map
from curate.store import Store

COUNTED = {"text_count": "text", "url_count": "url"}  # scorer, whose column has its name: what is counted
POOL_COUNTS = (*COUNTED, RareWordsStep.name)
COUNT = pa.field("count_", pa.int64())


def is_pool_count(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of `score:` is counted across shards rather than scored shard by shard."""
    return entry.get("scorer") in POOL_COUNTS


def pool_count_steps(
    section: Mapping[str, Mapping[str, Any]], samples: TableSpec, shards: Sequence[Shard]
) -> list[CrossStep]:
    """The steps for the entries of `score:` that look across shards. Raises ConfigError for unknown keys."""
    steps: list[CrossStep] = []
    for name, entry in section.items():
        if entry.get("scorer") == RareWordsStep.name:
            steps.append(RareWordsStep(name, entry, samples, shards))
        elif is_pool_count(entry):
            steps.append(PoolCountStep(name, entry, samples, shards))
    return steps


class PoolCountStep(CrossStep):
    """Writes `scores_<entry>` with the count: rows of the pool with the same value, this one included."""

    def __init__(self, name: str, entry: Mapping[str, Any], samples: TableSpec, shards: Sequence[Shard]) -> None:
        self.name = str(entry["scorer"])
        unknown = sorted(set(entry) - {"scorer"})
        if unknown:
            raise ConfigError(f"score.{name}.{unknown[0]}: unknown key; {self.name} has no settings")
        settings = {"scorer": self.name, "pool": pool_digest(shards)}
        schema = pa.schema([KEY, pa.field(self.name, pa.int64())])
        self._samples, self._counted = samples, COUNTED[self.name]
        self._spec = TableSpec(f"scores_{name}", 2, schema, settings, inputs_of([samples]))
        self.tables = (self._spec,)

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every shard has its counts."""
        return {shard.name for shard in shards} <= store.done(self._spec)

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Count; returns how many rows have a value that stands more than once."""
        work = f"_work/{self._spec.name}/{self._spec.fingerprint}"
        values = partial(_values, store, self._samples, self._counted)
        decide_across(store, work, shards, map_items, values, _repeated)
        counts: Counter[str] = Counter()
        commit = partial(_commit, store, self._spec, self._samples, self._counted, work)
        for repeated in map_items(commit, list(shards)):
            counts[f"rows with a repeated {self._counted}"] += repeated
            ticker.advance(1)
        store.remove_tree(work)
        return counts


def _values(store: Store, samples: TableSpec, column: str, shard: str) -> pa.Table:
    texts = store.read(samples, shard, [KEY.name, column]).column(column)
    rows = pa.array(range(len(texts)), ROW.type)
    values = [
        None if text is None else hashlib.blake2b(" ".join(text.split()).encode("utf-8", "replace"), digest_size=16)
        for text in texts.to_pylist()
    ]
    digests = pa.array([None if value is None else value.digest() for value in values], VALUE.type)
    table = pa.table([rows, digests], schema=pa.schema([ROW, VALUE]))
    return table.filter(pc.is_valid(table[VALUE.name]))


def _repeated(rows: pa.Table) -> pa.Table:
    """(shard, row, count) of every row whose value stands more than once."""
    with duckdb.connect(config={"threads": "1"}) as connection:
        connection.register("rows_", rows)
        found = connection.sql(
            "SELECT shard_, row_, count_ FROM (SELECT shard_, row_, count(*) OVER (PARTITION BY value_) AS count_ "
            "FROM rows_) WHERE count_ > 1 ORDER BY shard_, row_"
        ).to_arrow_table()
    return found.cast(pa.schema([SHARD, ROW, COUNT]))


def _commit(store: Store, spec: TableSpec, samples: TableSpec, column: str, work: str, shard: Shard) -> int:
    table = store.read(samples, shard.name, [KEY.name, column])
    counts: list[int | None] = [None if text is None else 1 for text in table.column(column).to_pylist()]
    verdicts = verdicts_on(store, work, shard.name)
    for row, count in zip(verdicts[ROW.name].to_pylist(), verdicts[COUNT.name].to_pylist(), strict=True):
        counts[row] = count
    if not store.has(spec, shard.name):  # of two runs at once the slower writes nothing over the faster
        store.write(spec, shard, pa.table([table.column(KEY.name), counts], schema=spec.schema), aligned_with=samples)
    return int(verdicts.num_rows)

"""Steps across shards: MetaCLIP's balance of captions over entries, and MoDE's experts.

    balance     matches, keep_probability, is_balanced      null for rows that the recipe leaves out
    experts     expert, expert_cell                         null for rows without a usable text vector

What captions contain (`stage`) is counted over the pool; a second pass draws. The passes are in `entries` and, with
torch, which a plan does not load, in `experts`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyarrow as pa

from curate.balance import entries
from curate.balance.entries import MATCHED
from curate.config import BalanceSettings, ExpertsSettings
from curate.errors import PlanError
from curate.metrics import Ticker
from curate.rows import columns_of, names_in, schema_of
from curate.schema import KEY, Shard, TableSpec, inputs_of, pool_digest
from curate.stage import CrossStep, Map
from curate.store import Store
from curate.vectors import founders, pool_of

BALANCE = (
    pa.field("matches", pa.int32()),  # entries that the caption contains
    pa.field("keep_probability", pa.float32()),  # 1 - Π(1 - p) over them; 0 without one
    pa.field("is_balanced", pa.bool_()),  # what was drawn
)
EXPERTS = (
    pa.field("expert", pa.int32()),
    pa.field("expert_cell", pa.int32()),  # the fine cell
)


class BalanceStep(CrossStep):
    """Writes `balance`."""

    name = "balance"

    def __init__(
        self, settings: BalanceSettings, store: Store, tables: Sequence[TableSpec], shards: Sequence[Shard]
    ) -> None:
        columns = columns_of(tables)
        if MATCHED.name not in columns:
            raise PlanError(
                "balance: nothing is matched before; stream `match_stage` first, as pipelines/metaclip.py does"
            )
        used = [MATCHED.name, *(["status"] if "status" in columns else [])]
        try:
            used += names_in(settings.where, schema_of(columns)) if settings.where else []
        except PlanError as error:
            raise PlanError(f"balance.where: {error}") from None
        self.settings = settings
        read = {columns[name].table.name: columns[name].table for name in used}
        identity = settings.model_dump(mode="json", exclude={"entries", "column", "version"})  # `matches` has these
        identity |= {"pool": pool_digest(shards)}
        self._spec = TableSpec("balance", 2, pa.schema([KEY, *BALANCE]), identity, inputs_of(read.values()))
        self.tables = (self._spec,)
        work = f"_work/balance/{self._spec.fingerprint}"
        self._captions = entries.Captions(store, columns, tuple(dict.fromkeys(used)), settings, self._spec, work)

    @property
    def _facts(self) -> str:
        return f"_balance/{self._spec.fingerprint}/facts.json"

    def facts(self, store: Store) -> dict[str, Any] | None:
        """t, p, entries, matches and what was kept; None before the step has run."""
        return cast("dict[str, Any] | None", store.get_json(self._facts))

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every shard has its draws."""
        return store.exists(self._facts) and {shard.name for shard in shards} <= store.done(self._spec)

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Count and draw; counts are captions."""
        facts = entries.balance(self._captions, shards, map_items, ticker)
        store.put_json(self._facts, facts)
        store.remove_tree(self._captions.work)
        return {f"captions {name}": facts[f"captions_{name}"] for name in ("seen", "matched", "kept")}


def balance_step(
    settings: BalanceSettings, store: Store, tables: Sequence[TableSpec], shards: Sequence[Shard]
) -> BalanceStep:
    """The step for these settings. Raises PlanError for an unknown column, bad SQL, or a pool without `matches`."""
    return BalanceStep(settings, store, tables, shards)


class ExpertsStep(CrossStep):
    """Writes `experts`: trained on the pool's founders, so that a refresh assigns new shards alone and models that were
    trained on yesterday's experts keep theirs. Once the pool has doubled, all is trained and assigned anew."""

    name = "experts"

    def __init__(
        self, settings: ExpertsSettings, store: Store, tables: Sequence[TableSpec], shards: Sequence[Shard]
    ) -> None:
        if not settings.coarse <= settings.fine <= settings.sample:
            raise PlanError("experts: expected coarse <= fine <= sample")
        self.settings = settings
        self._pool = pool_of(store, tables, shards, settings.by, settings.where, self.name)
        self._founding = pool_of(store, tables, founders(shards), settings.by, settings.where, self.name)
        identity = settings.model_dump(mode="json") | {"founders": pool_digest(founders(shards))}
        self._spec = TableSpec("experts", 1, pa.schema([KEY, *EXPERTS]), identity, inputs_of(self._pool.tables))
        self.tables = (self._spec,)

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every shard has its experts."""
        return {shard.name for shard in shards} <= store.done(self._spec)

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Train on a sample, assign all; counts are captions by expert."""
        from curate.balance import experts  # noqa: PLC0415  # torch: not for a plan

        work = f"_work/experts/{self._spec.fingerprint}"
        experts.prepare(self._founding, self.settings, self._spec, work, map_items)
        counts = experts.assign_all(self._pool, self.settings, self._spec, shards, map_items, ticker)
        store.remove_tree(work)
        return counts


def experts_step(
    settings: ExpertsSettings, store: Store, tables: Sequence[TableSpec], shards: Sequence[Shard]
) -> ExpertsStep:
    """The step for these settings. Raises PlanError for an unknown column, bad SQL, or numbers that do not fit."""
    return ExpertsStep(settings, store, tables, shards)

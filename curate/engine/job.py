"""One run of a recipe: what a pipeline file talks to.

A pipeline says `job.ingest(…)`, `job.stream(…)`, `job.across(…)` in the order of its paper. A job that only plans goes
through the same calls, checks everything and executes nothing; a run begins by planning, so that what can fail early
fails before any worker starts.
"""

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from curate.config import EngineSettings, Recipe
from curate.engine.attempts import forgive, set_aside
from curate.engine.driver import Driver
from curate.engine.inline import InlineDriver
from curate.errors import PlanError, StageError, StoreError
from curate.metrics import Cost, progress, total
from curate.presence import present
from curate.retry import check_statuses, reopen, revised
from curate.schema import FAILURES, Shard, TableSpec
from curate.stage import FETCHED_BYTES, CrossStep, ShardReport, Stage
from curate.store import Store, remedy

PLAN = "plan.json"  # what the newest run of this root is made of; `status`, `explain` and `sql` start from it


@dataclass
class StepRecord:
    """A line of the plan and of the funnel."""

    name: str
    tables: list[str]
    todo: int  # shards, or 1 for a cross-shard step that is not done
    of: int
    counts: dict[str, int] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    set_aside: dict[str, str] = field(default_factory=dict)
    note: str = ""


class Job:
    """See the module's docstring. `shards` are those that no stage has set aside."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        dry: bool = False,
        driver: Callable[[], Driver] | None = None,
        retry: frozenset[str] = frozenset(),
    ) -> None:
        self.recipe, self.dry = recipe, dry
        self.store = Store(recipe.root)
        self.shards: list[Shard] = []
        self.tables: dict[str, TableSpec] = {}
        self.records: list[StepRecord] = []
        self._driver: Driver | None = None
        self._at_work = ExitStack()
        self._open = driver or (lambda: open_driver(recipe.engine))
        check_statuses(retry - {"set_aside"})
        self._retry = retry
        self.store.check(writable=True)

    @property
    def driver(self) -> Driver:
        """The engine, started when first needed: a run with nothing to do starts none."""
        if self._driver is None:
            self._driver = self._open()
        return self._driver

    @property
    def set_aside(self) -> dict[str, str]:
        """Shards that were given up, with the cause."""
        return {name: cause for record in self.records for name, cause in record.set_aside.items()}

    def close(self) -> None:
        """Stop the engine if it was started, and let removals in again."""
        if self._driver is not None:
            self._driver.close()
            self._driver = None
        self._at_work.close()

    def ingest(self, step: CrossStep) -> TableSpec:
        """Bring new sources into the pool; afterwards `shards` is the whole pool.

        Raises PlanError while `curate remove` is at work at this root.
        """
        if not self.dry:
            self._at_work.enter_context(present(self.store, "run"))
        (samples,) = step.tables
        self._register(step)
        self._across(step, [])
        self.shards = self.store.shards(samples)
        gone = sorted({shard.name for shard in self.shards} - self.store.done(samples))
        if gone:
            where = self.store.url(self.store.shard_path(samples, gone[0]))
            raise StoreError(f"{where}: {len(gone)} shards of the pool lost their samples; {remedy(samples.name)}")
        self.records[-1].of = len(self.shards)
        return samples

    def stream(self, *stages: Stage) -> None:
        """Take every shard through a chain of per-shard stages; only missing tables are computed."""
        for stage in stages:
            self._register(stage)
            stage.check(self.store)
        if not self.dry and "set_aside" in self._retry:
            for stage in stages:
                forgive(self.store, stage)
        self._reopen(stages)
        given_up = {stage.name: set_aside(self.store, stage) for stage in stages}
        left = [shard for shard in self.shards if not any(shard.name in names for names in given_up.values())]
        done = {stage.name: self._done(stage) for stage in stages}
        todo = [shard for shard in left if any(shard.name not in done[stage.name] for stage in stages)]
        records = [
            StepRecord(
                stage.name, [spec.name for spec in stage.tables],
                sum(shard.name not in done[stage.name] for shard in left), len(self.shards),
                set_aside=given_up[stage.name],
            )
            for stage in stages
        ]  # fmt: skip
        self.records += records
        if todo and not self.dry:
            for stage in stages:
                for spec in stage.tables:
                    self.store.describe(spec)
            self._drive(stages, todo, records)
        lost = {name for record in records for name in record.set_aside}
        alive = [shard for shard in self.shards if shard.name not in lost]
        if self.shards and not alive:
            causes = [cause for record in records for cause in record.set_aside.values()]
            raise StageError(
                f"every shard was set aside; the last cause: {causes[-1]}\n"
                "mend it, then run again (with --retry set_aside when the recipe stays as it is)"
            )
        self.shards = alive

    def across(self, step: CrossStep) -> None:
        """Run a step that looks at all shards, unless what it writes is there."""
        self._register(step)
        step.check(self.store)
        self._across(step, self.shards)

    def check_workers(self) -> None:
        """Raise PlanError for a name in `engine.workers` that no stage of this pipeline has."""
        names = {record.name for record in self.records}
        unknown = sorted(set(self.recipe.engine.workers) - names)
        if unknown:
            raise PlanError(f"engine.workers.{unknown[0]}: no such stage; this pipeline has {', '.join(sorted(names))}")

    def note(self) -> None:
        """Leave in the store what this run is made of, unless it says so already."""
        note = {
            "recipe": self.recipe.model_dump(mode="json"),
            "tables": [pack_spec(spec) for spec in self.tables.values()],
            "steps": [{"name": record.name, "tables": record.tables} for record in self.records],
            "shards": [shard.name for shard in self.shards],
            "set_aside": self.set_aside,
        }  # fmt: skip
        if self.store.get_json(PLAN) != note:
            self.store.put_json(PLAN, note)

    def _register(self, step: Stage | CrossStep) -> None:
        for spec in step.tables:
            if spec.name in self.tables:
                raise StageError(f"two steps of this pipeline write the table {spec.name}")
            self.tables[spec.name] = spec

    def _done(self, stage: Stage) -> set[str]:
        return set.intersection(*(self.store.done(spec) for spec in stage.tables))

    def _reopen(self, stages: Sequence[Stage]) -> None:
        """Open committed shards again for the statuses of `--retry`, and give every shard its revision."""
        statuses = sorted(self._retry - {"set_aside"})
        for spec in (spec for stage in stages for spec in stage.tables if spec.with_images):
            if statuses and not self.dry:
                with progress(f"retry {', '.join(statuses)}", max(1, len(self.shards))) as ticker:
                    for shard in self.shards:
                        rows = reopen(self.store, spec, shard, statuses)
                        ticker.advance(1, f"{rows:,} rows of {shard.name}")
            self.shards = revised(self.store, spec, self.shards)

    def _across(self, step: CrossStep, shards: Sequence[Shard]) -> None:
        done = step.done(self.store, shards)
        record = StepRecord(step.name, [spec.name for spec in step.tables], int(not done), 1, note=step.note)
        self.records.append(record)
        if self.dry:
            return
        if done:
            self._sweep(step)
            return
        for spec in step.tables:
            self.store.describe(spec)
        with progress(step.name, max(1, len(shards))) as ticker:
            try:
                record.counts = dict(step.run(self.store, shards, self._map, ticker))
            except Exception:  # another run at this root finished the step and swept away what this one was reading
                if not step.done(self.store, shards):
                    raise
                self._sweep(step)
        for spec in step.tables:
            self.store.sweep(self.store.folder(spec))

    def _sweep(self, step: CrossStep) -> None:
        """Remove what a run that lost a race, or was killed at the very end, left of a step that is done."""
        for spec in step.tables:
            with suppress(OSError):  # a run that is still losing writes on; the next one sweeps again
                self.store.remove_tree(f"_work/{spec.name}/{spec.fingerprint}")

    def _map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Any:
        return self.driver.map(function, items)

    def _drive(self, stages: Sequence[Stage], todo: Sequence[Shard], records: Sequence[StepRecord]) -> None:
        gathered: dict[str, list[ShardReport]] = {stage.name: [] for stage in stages}
        label = " + ".join(stage.name for stage in stages)
        start = time.monotonic()
        with progress(f"{label} ({len(todo):,} shards)", sum(shard.rows for shard in todo)) as ticker:
            for reports in self.driver.run(self.store, stages, todo):
                for report in reports:
                    gathered[report.stage].append(report)
                ticker.advance(reports[0].rows, progress_note(gathered[stages[0].name], time.monotonic() - start))
        for spec in (spec for stage in stages for spec in stage.tables):
            self.store.sweep(self.store.folder(spec))
        for record in records:
            reports = gathered[record.name]
            record.counts = total([report.counts for report in reports])
            record.cost = sum((report.cost for report in reports), Cost())
            record.set_aside |= {report.shard: report.set_aside for report in reports if report.set_aside}


def progress_note(reports: Sequence[ShardReport], elapsed_s: float) -> str:
    """Success, speed and the three commonest failures of a stage: `81 % ok, 512/s, 98 MB/s; timeout 9 %, dns 8 %`."""
    done = [report for report in reports if report.computed]
    rows, counts = sum(report.rows for report in done), total([report.counts for report in done])
    if not rows:
        return ""
    failures = sorted((-counts[name], name) for name in FAILURES if name in counts)
    told = [f"{100 * counts.get('ok', 0) / rows:.0f} % ok"] if failures or "ok" in counts else []
    told.append(f"{rows / elapsed_s:,.0f}/s")
    if FETCHED_BYTES in counts:
        told.append(f"{counts[FETCHED_BYTES] / 1e6 / elapsed_s:,.0f} MB/s")
    failed = ", ".join(f"{name} {-100 * count / rows:.0f} %" for count, name in failures[:3])
    return ", ".join(told) + (f"; {failed}" if failed else "")


def open_driver(settings: EngineSettings) -> Driver:
    """The engine that the recipe names."""
    if settings.driver == "inline":
        return InlineDriver()
    from curate.engine.ray import RayDriver  # noqa: PLC0415  # Ray is heavy, and an inline run must not load it

    return RayDriver(settings.address, dict(settings.workers), settings.cpus)


def pack_spec(spec: TableSpec) -> dict[str, Any]:
    """A TableSpec as JSON."""
    return {
        "name": spec.name, "version": spec.version, "settings": dict(spec.settings), "inputs": dict(spec.inputs),
        "with_images": spec.with_images, "open_schema": spec.open_schema, "fingerprint": spec.fingerprint,
        "schema": base64.b64encode(spec.schema.serialize().to_pybytes()).decode(),
    }  # fmt: skip


def unpack_spec(plain: Mapping[str, Any]) -> TableSpec:
    """The TableSpec that `pack_spec` wrote."""
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(plain["schema"])))
    return TableSpec(
        plain["name"], plain["version"], schema, plain["settings"], plain["inputs"], plain["with_images"],
        plain["open_schema"],
    )  # fmt: skip

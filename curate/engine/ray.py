"""Stages on Ray Data, one shard per row; cross-shard maps as Ray tasks. The only file that imports Ray.

Ray does pools, backpressure, autoscaling, retries and the dashboard. What travels between stages is a shard's name and
its reports, never its data: that goes through the store. Ray restarts dead actors and retries their shard without end;
`engine.attempts` bounds that.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any
from uuid import uuid4

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from curate.engine.attempts import MAX_TRIES, run_bounded
from curate.engine.driver import Driver, OnDevice
from curate.errors import StageError
from curate.metrics import Cost
from curate.schema import Shard
from curate.stage import ShardReport, Stage
from curate.store import Store

IN_FLIGHT_PER_CPU = 4  # map tasks queued per core: enough to hide scheduling, few enough to bound results held
_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|MissingTable): ")  # a traceback's last line
NODE_LOSSES = 20  # times that a map item may lose its machine before we give up on it


class _Worker:
    """One stage in one Ray actor."""

    def __init__(self, store: Store, stage: Stage, run_id: str) -> None:
        self._store, self._stage, self._run_id = store, stage, run_id
        stage.setup()

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        for row in rows:
            reports = row["reports"]
            if not (reports and reports[-1]["set_aside"]):
                shard = Shard(row["name"], row["rows"])
                report = _bounded(self._store, self._stage, shard, self._run_id)
                row["reports"] = [*reports, _pack(report)]
        return pa.Table.from_pylist(rows, schema=_ROW)


def _bounded(store: Store, stage: Stage, shard: Shard, run_id: str) -> ShardReport:
    return run_bounded(store, stage, shard, run_id, ray.get_runtime_context().get_node_id(), _living_nodes)


def _chain(store: Store, stages: Sequence[Stage], run_id: str, shard: Shard) -> list[ShardReport]:
    """A shard through stages that keep nothing between shards, in one task."""
    reports: list[ShardReport] = []
    for stage in stages:
        reports.append(_bounded(store, stage, shard, run_id))
        if reports[-1].set_aside:
            break
    return reports


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def _living_nodes() -> list[str]:
    nodes: Any = ray.nodes  # untyped in Ray
    return [node["NodeID"] for node in nodes() if node["Alive"]]


_REPORT = pa.struct([
    ("stage", pa.string()), ("shard", pa.string()), ("rows", pa.int64()), ("computed", pa.list_(pa.string())),
    ("counts", pa.map_(pa.string(), pa.int64())), ("wall_s", pa.float64()), ("cpu_s", pa.float64()),
    ("peak_rss_mb", pa.float64()), ("set_aside", pa.string()),
])  # fmt: skip
_ROW = pa.schema([("name", pa.string()), ("rows", pa.int64()), ("reports", pa.list_(_REPORT))])


def _pack(report: ShardReport) -> dict[str, Any]:
    plain = asdict(report)
    return {**plain, **plain.pop("cost"), "counts": sorted(report.counts.items()), "computed": list(report.computed)}


def _unpack(plain: dict[str, Any]) -> ShardReport:
    cost = Cost(plain["wall_s"], plain["cpu_s"], plain["peak_rss_mb"])
    return ShardReport(
        plain["stage"], plain["shard"], plain["rows"], tuple(plain["computed"]), dict(plain["counts"]), cost,
        plain["set_aside"],
    )  # fmt: skip


class RayDriver(Driver):
    """Joins a Ray cluster (`address`, else RAY_ADDRESS) or starts one on this machine for the life of the driver."""

    name = "ray"

    def __init__(self, address: str | None = None, workers: dict[str, int] | None = None, cpus: int | None = None):
        self._workers = workers or {}
        self._started = not ray.is_initialized()
        if self._started:
            address = address or os.environ.get("RAY_ADDRESS")  # set inside a Ray job
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if not address:  # a note of Ray's core on restarts, in red, that means nothing to who reads our output
                os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            local: dict[str, Any] = {} if address else {"num_cpus": cpus, "include_dashboard": False}
            ray.init(address=address or "local", **quiet, **local)

    def run(self, store: Store, stages: Sequence[Stage], shards: Sequence[Shard]) -> Iterator[list[ShardReport]]:
        """See Driver.run."""
        run_id = uuid4().hex
        if all(type(stage).setup is Stage.setup for stage in stages):  # nothing to load: actors would only cost starts
            most = min((self._workers[stage.name] for stage in stages if stage.name in self._workers), default=None)
            yield from self._tasks(partial(_chain, store, stages, run_id), shards, most)
        elif shards:
            yield from self._actors(store, stages, shards, run_id)

    def _actors(
        self, store: Store, stages: Sequence[Stage], shards: Sequence[Shard], run_id: str
    ) -> Iterator[list[ShardReport]]:
        context = DataContext.get_current()
        context.enable_progress_bars = False  # ours says more: failures and rates of the domain
        context.print_on_execution_start = False
        context.execution_options.preserve_order = False
        context.max_consecutive_actor_init_deaths = (
            MAX_TRIES  # 0, Ray's own: a node lost while a model loads ends the run
        )
        rows = [{"name": shard.name, "rows": shard.rows, "reports": []} for shard in shards]
        blocks = [pa.Table.from_pylist([row], schema=_ROW) for row in rows]
        dataset: Dataset = ray.data.from_arrow(blocks)
        scale = _fit(stages)
        for stage in stages:
            most = min(self._workers.get(stage.name, max(1, int(_cluster("CPU")))), len(shards))
            dataset = dataset.map_batches(
                _Worker, fn_constructor_args=(store, stage, run_id), batch_size=1, batch_format="pyarrow",
                compute=ActorPoolStrategy(min_size=1, max_size=most),
                num_cpus=stage.resources.cpus * scale, num_gpus=stage.resources.gpus or None,
                memory=int(stage.resources.memory_gb * 2**30) or None,
            )  # fmt: skip
        try:
            for row in dataset.iter_rows():
                yield [_unpack(report) for report in row["reports"]]
        except ray.exceptions.RayError as error:
            names = ", ".join(stage.name for stage in stages)
            raise StageError(f"{names}: a worker could not start or go on: {_short(error)}") from error

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """See Driver.map."""
        return self._tasks(function, items)

    def _tasks(self, function: Callable[[Any], Any], items: Sequence[Any], most: int | None = None) -> Iterator[Any]:
        if not items:
            return
        # A task that is given no GPU sees none (Ray hides them), and computes on its core.
        gpus = function.gpus if isinstance(function, OnDevice) and _cluster("GPU") >= function.gpus else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=NODE_LOSSES)(_call)
        shared = ray.put(function)  # once, not with every item: it may hold settings of a whole pool
        window = most or max(2, int(_cluster("CPU")) * IN_FLIGHT_PER_CPU)
        waiting = [task.remote(shared, item) for item in items[:window]]
        following = window
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            if following < len(items):
                waiting.append(task.remote(shared, items[following]))
                following += 1
            try:
                yield ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error  # the caller sees the error that the function raised

    def close(self) -> None:
        """Leave the cluster; stop it if we started it."""
        if self._started:
            ray.shutdown()


def _cluster(resource: str) -> float:
    resources: Any = ray.cluster_resources  # untyped in Ray
    return float(resources().get(resource, 0.0))


def _fit(stages: Sequence[Stage]) -> float:
    """Shares of a core by which a chain of stages fits a small cluster: each stage holds one actor at least."""
    wanted = sum(stage.resources.cpus for stage in stages)
    return min(1.0, _cluster("CPU") / wanted) if wanted else 1.0


def _short(error: BaseException) -> str:
    """The error that a worker raised, out of Ray's report of it; else the report's last line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line) and not line.startswith("ray.")]
    return (raised or lines or [type(error).__name__])[-1][:1000]

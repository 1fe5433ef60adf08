"""Everything in this process, one shard after the other: tests, debugging, replay of one shard."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import uuid4

from curate.engine.attempts import run_bounded
from curate.engine.driver import Driver
from curate.schema import Shard
from curate.stage import ShardReport, Stage
from curate.store import Store


class InlineDriver(Driver):
    """No processes, no parallelism, the same results."""

    name = "inline"

    def run(self, store: Store, stages: Sequence[Stage], shards: Sequence[Shard]) -> Iterator[list[ShardReport]]:
        """See Driver.run."""
        run_id = uuid4().hex
        ready: list[Stage] = []
        try:
            for stage in stages:
                stage.setup()
                ready.append(stage)
            for shard in shards:
                reports: list[ShardReport] = []
                for stage in stages:
                    reports.append(run_bounded(store, stage, shard, run_id, "here", lambda: ["here"]))
                    if reports[-1].set_aside:
                        break
                yield reports
        finally:
            for stage in ready:
                stage.teardown()

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """See Driver.map."""
        return map(function, items)

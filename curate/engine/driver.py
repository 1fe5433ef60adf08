"""What an engine offers, whichever it is: stages streamed over shards, and an unordered map over items."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from curate.schema import Shard
from curate.stage import ShardReport, Stage
from curate.store import Store


@dataclass(frozen=True)
class OnDevice:
    """A function for `Driver.map` that computes on a GPU where the engine has some: each call gets `gpus` of one."""

    function: Callable[[Any], Any]
    gpus: float = 1.0

    def __call__(self, item: Any) -> Any:
        """The function's own result."""
        return self.function(item)


class Driver(ABC):
    """Runs work somewhere. Results do not depend on which driver, nor on the number of workers."""

    name: str

    @abstractmethod
    def run(self, store: Store, stages: Sequence[Stage], shards: Sequence[Shard]) -> Iterator[list[ShardReport]]:
        """Stream shards through a chain of stages; yields, per finished shard in any order, its report of each stage.

        A shard that a stage sets aside does not reach the stages behind it.
        """

    @abstractmethod
    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """`function(item)` for every item, in any order. Both must be picklable; an exception ends the map."""

    def close(self) -> None:  # noqa: B027  # only an engine that started something has something to stop
        """Stop what the driver started."""

"""Running a scorer over the rows of a chunk: fixed batches, memory that runs out, samples that make it raise.

Out of device memory halves the batch and goes on. A scorer that raises is asked again row by row: the rows that still
raise are given up with a reason, and if every one does, the scorer itself is broken and the error is raised.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curate.score.scorer import Values

Call = Callable[[Sequence[Any]], Mapping[str, Values]]


@dataclass
class Outcome:
    """Values of the scored rows, column by column; `kept` numbers those rows, `failed` says why others were not."""

    kept: list[int] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def add(self, rows: Sequence[int], values: Mapping[str, Values]) -> None:
        """Append the values of these rows."""
        self.kept += rows
        for name, part in values.items():
            if len(part) != len(rows):
                raise ValueError(f"{name}: {len(part)} values for {len(rows)} rows")
            self.columns.setdefault(name, []).append(part)

    def column(self, name: str) -> Values:
        """All values of a column, in the order of `kept`."""
        parts = self.columns.get(name, [])
        if parts and all(isinstance(part, np.ndarray) for part in parts):
            return np.concatenate(parts)
        return [value for part in parts for value in part]


class Batches:
    """Calls a scorer in batches of at most `size`, which shrinks for good when memory ran out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, call: Call, items: Sequence[Any]) -> Outcome:
        """Score all items. Raises what the scorer raises when it does so for each row of a batch of two or more."""
        outcome = Outcome()
        start = 0
        while start < len(items):
            rows = list(range(start, min(start + self.size, len(items))))
            try:
                values = call([items[row] for row in rows])
            except Exception as error:
                if out_of_memory(error):
                    self._halve(error, len(rows))
                    continue
                self._one_by_one(call, items, rows, outcome, error)
            else:
                outcome.add(rows, values)
            start = rows[-1] + 1
        return outcome

    def _halve(self, error: Exception, rows: int) -> None:
        if rows == 1:
            raise error
        self.size = max(1, rows // 2)
        torch = sys.modules.get("torch")  # whoever ran out of its memory has loaded it
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _one_by_one(
        self, call: Call, items: Sequence[Any], rows: Sequence[int], outcome: Outcome, error: Exception
    ) -> None:
        failed: dict[int, str] = {}
        for row in rows:
            try:
                values = call([items[row]])
            except Exception as cause:
                if out_of_memory(cause):
                    raise
                failed[row] = f"raised_{type(cause).__name__}"
            else:
                outcome.add([row], values)
        if len(rows) > 1 and len(failed) == len(rows):
            raise error
        outcome.failed |= failed


def out_of_memory(error: BaseException) -> bool:
    """Whether device or host had too little memory; torch's class is told by its name, so as not to load it."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"

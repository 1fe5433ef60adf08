"""The match stage: which entries of the metadata each caption contains. Reads texts alone, so it goes before the fetch.

    matches     matched_entries     indices into the list of entries, ascending; null for a row without a caption

What contains no entry is never balanced, and a recipe need not ask for its image: `fetch.where`.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from curate.balance.entries import MATCHED, digest_of, read_entries
from curate.balance.metaclip import Matcher
from curate.config import BalanceSettings
from curate.errors import PlanError
from curate.rows import columns_of
from curate.schema import KEY, TableSpec, inputs_of
from curate.stage import Read, Stage, Task


class MatchStage(Stage):
    """Writes `matches`."""

    name = "match"
    batch_rows = 1 << 14  # captions: a pass looks up their common words once

    def __init__(self, settings: BalanceSettings, tables: Sequence[TableSpec]) -> None:
        super().__init__()
        columns = columns_of(tables)
        column = columns.get(settings.column)
        if column is None or not pa.types.is_string(column.type):
            raise PlanError(f"balance.column: {settings.column} is no column of text that is known before the images")
        self._entries, self._version = read_entries(settings.entries), settings.version
        if "" in self._entries and settings.version == 2:
            raise PlanError(f"balance.entries: {settings.entries} has an empty entry, which version 2 cannot place")
        identity = {"entries": digest_of(settings.entries), **settings.model_dump(include={"column", "version"})}
        spec = TableSpec("matches", 1, pa.schema([KEY, MATCHED]), identity, inputs_of([column.table]))
        self._column, self.tables = column, (spec,)
        self._matcher: Matcher | None = None

    def reads(self, missing: frozenset[str]) -> Sequence[Read]:
        """Captions."""
        return [Read(self._column.table, (self._column.column,))]

    def setup(self) -> None:
        """Build the matcher: 4 s and 200 MB for 500,000 entries."""
        self._matcher = Matcher(self._entries, self._version)

    def teardown(self) -> None:
        """Free it."""
        self._matcher = None

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        """See Stage.process."""
        assert self._matcher is not None
        (spec,) = self.tables
        for batch in batches:
            captions = batch.column(self._column.column).to_pylist()
            pairs = self._matcher.matches(captions)
            starts = np.searchsorted(pairs[:, 0], np.arange(len(captions) + 1)).astype(np.int32)
            found = pa.ListArray.from_arrays(
                pa.array(starts), pa.array(pairs[:, 1].astype(np.int32)),
                mask=pa.array([caption is None for caption in captions]),
            )  # fmt: skip
            self.counters["matched"] += int(np.count_nonzero(np.diff(starts)))
            yield {spec.name: pa.RecordBatch.from_arrays([found], schema=pa.schema([MATCHED]))}


def match_stage(settings: BalanceSettings, tables: Sequence[TableSpec]) -> MatchStage:
    """The stage for these settings over the tables that are known without images. Raises PlanError for a column that is
    none of theirs, or entries that cannot be read.
    """
    return MatchStage(settings, tables)

"""pHashes within a Hamming radius as a search over partitions (`near`), exact whatever their number.

A block is a table of block permutation and its partitions are ranges of that table's key, so hashes that can meet in
the table meet in one partition; all tables together find every pair (`hamming.edges_in_table`). A pool that one task
holds is compared at once.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.dedup.hamming import edges_in_table, edges_within
from curate.dedup.hamming_tables import HashArray, Tables, plan_tables
from curate.dedup.near import FRESH, Edges, IntArray, Pool, Records
from curate.errors import PlanError

HASH_BITS = 64
HASH = re.compile("[0-9a-fA-F]{16}")
ROWS_PER_TASK = 16_000_000  # hashes compared in one task: 0.3 GB of hashes and row numbers, about 1 GB at the peak
SHARDS_PER_CHUNK = 200
SAMPLED_SHARDS = 64  # the plan looks at the bits of these

_RECORD = np.dtype([("hash", np.uint64), ("row", np.int64), ("known", np.int64)])


@dataclass(frozen=True)
class HashSearch:
    """See the module's docstring. `tables` is None where one task compares all."""

    radius: int
    tables: Tables | None
    parts: int  # a power of two
    shards_per_chunk: int
    grouped: bool = True

    @property
    def record(self) -> np.dtype[Any]:
        """A hash, its row, the group that it is known to be in."""
        return _RECORD

    @property
    def blocks(self) -> int:
        """Tables."""
        return 1 if self.tables is None else len(self.tables)

    def deal(
        self, values: HashArray, rows: IntArray, known: IntArray
    ) -> tuple[Edges, Iterator[tuple[npt.NDArray[np.int32], Records]]]:
        """Every hash into one partition of each table."""
        records = np.empty(len(values), _RECORD)
        records["hash"], records["row"], records["known"] = values, rows, known
        return (np.empty((0, 2), np.int64), np.empty(0, np.float32)), self._blocks(records)

    def _blocks(self, records: Records) -> Iterator[tuple[npt.NDArray[np.int32], Records]]:
        bits = self.parts.bit_length() - 1
        for block in range(self.blocks):
            if self.tables is None or not bits:
                yield np.zeros(len(records), np.int32), records
            else:
                top = self.tables.permute(np.ascontiguousarray(records["hash"]), block) >> np.uint64(64 - bits)
                yield top.astype(np.int32), records

    def find(self, block: int, part: int, pieces: Iterable[Records], lost: IntArray) -> tuple[Edges, int]:
        """Edges of a table among the hashes of a range of its key; similarity is 1 less a 64th for each bit."""
        records = np.concatenate([np.empty(0, _RECORD), *pieces])
        hashes = np.ascontiguousarray(records["hash"])
        fresh = (records["known"] == FRESH) | np.isin(records["known"], lost)
        if self.tables is None:
            pairs, compared = edges_within(hashes, self.radius, fresh=fresh)
        else:
            pairs, compared = edges_in_table(hashes, self.tables, block, fresh=fresh)
        distance = np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]])
        return (np.asarray(records["row"][pairs], np.int64), similarity_of(distance)), compared


def search_hashes(pool: Pool, radius: int) -> HashSearch:
    """The search for this pool, planned from the bits of a spread of shards; the same whenever it is asked."""
    parts = 1 << (max(0, pool.rows - 1) // ROWS_PER_TASK).bit_length()
    if parts == 1:
        return HashSearch(radius, None, 1, SHARDS_PER_CHUNK)
    step = max(1, len(pool.names) // SAMPLED_SHARDS)
    sample = [pool.values(name)[0] for name in pool.names[::step]]
    tables = plan_tables(np.concatenate(sample), radius, n=pool.rows)
    if len(tables) == 0:
        return HashSearch(radius, None, 1, SHARDS_PER_CHUNK)
    return HashSearch(radius, tables, parts, SHARDS_PER_CHUNK)


def hashes_of(texts: Sequence[str | None]) -> HashArray:
    """Sixteen hexadecimal digits each, first digit highest, as uint64. Raises PlanError for anything else."""
    there = [text for text in texts if text is not None]
    wrong = next((text for text in there if not is_hash(text)), None)
    if wrong is not None:
        raise PlanError(
            f"{wrong[:40]!r} is no pHash of 16 hexadecimal digits; score it again, or compare equal ones only"
        )
    return np.array([int(text, 16) for text in there], np.uint64)


def is_hash(text: str) -> bool:
    """Whether these are sixteen hexadecimal digits."""
    return HASH.fullmatch(text) is not None


def similarity_of(distance: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """1 for equal hashes, less a 64th for each bit."""
    return np.asarray(1 - distance / HASH_BITS, np.float32)

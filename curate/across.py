"""Rows of all shards brought together by a value, decided, and the verdicts carried back to the shards.

    <work>/spill/<partition>/<chunk>.parquet    candidate rows of a chunk of shards, dealt by the hash of their value
    <work>/spilled/<chunk>.json                 the chunk's candidates are all there
    <work>/verdict/<partition>.parquet          what was decided of rows, ordered by shard and row
    <work>/back/<shard>.parquet                 the verdicts on a shard's rows

Equal values meet in one partition whatever shard they stand in, and a partition fits a process, so a decision is exact
and memory is bounded. Every file is written whole and none is made twice: killed anywhere, a second run goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.schema import Shard
from curate.stage import Map
from curate.store import Store

ROWS_PER_PARTITION = 4_000_000  # 64 bytes a row with a usual keep order: a quarter GiB in the deciding process
PARTITION_BYTES = 1 << 30  # where rows are larger
SHARDS_PER_SPILL = 50  # a billion rows are then half a million files between the passes, not 25 million
SHARDS_PER_RETURN = 200  # verdict files are read once per this many shards
CHUNKS = 32  # at least, where there are as many shards: work for that many cores

ROW = pa.field("row_", pa.int64())  # number of a row in its shard
VALUE = pa.field("value_", pa.binary(16))  # hash of what rows are compared by
SHARD = pa.field("shard_", pa.int64())  # number of a shard in the pool

# Rows of a shard that take part: row_, value_ and whatever the decision reads.
Candidates = Callable[[str], pa.Table]
# All candidates of a partition, with shard_, to rows (shard_, row_, …) ordered by shard and row.
Decide = Callable[[pa.Table], pa.Table]


def decide_across(
    store: Store, work: str, shards: Sequence[Shard], map_items: Map, candidates: Candidates, decide: Decide,
    row_bytes: int = 64,
) -> None:  # fmt: skip
    """Run the three passes below the folder `work`; `verdicts_on` then reads what was decided of a shard.

    `candidates` and `decide` must be picklable and depend on nothing but their argument and committed tables.
    `row_bytes` says how large a candidate is.
    """
    names = [shard.name for shard in shards]
    partitions = max(
        1, -(-sum(shard.rows for shard in shards) // min(ROWS_PER_PARTITION, PARTITION_BYTES // row_bytes))
    )
    spilled = set(store.names(f"{work}/spilled"))
    todo = [chunk for chunk in _chunks(len(names), SHARDS_PER_SPILL) if f"{chunk.start:08d}.json" not in spilled]
    _finish(map_items(partial(_spill, store, work, names, partitions, candidates), todo))
    decided = set(store.names(f"{work}/verdict"))
    parts = [number for number in range(partitions) if f"{number:05d}.parquet" not in decided]
    _finish(map_items(partial(_decide, store, work, decide), parts))
    back = set(store.names(f"{work}/back"))
    chunks = _chunks(len(names), SHARDS_PER_RETURN)
    todo = [chunk for chunk in chunks if any(f"{names[number]}.parquet" not in back for number in chunk)]
    _finish(map_items(partial(_return, store, work, names), todo))


def verdicts_on(store: Store, work: str, shard: str) -> pa.Table:
    """What was decided of a shard's rows: row_ and the columns that `decide` gave, ordered by row."""
    return _get(store, f"{work}/back/{shard}.parquet").drop_columns([SHARD.name])


def _chunks(count: int, most: int) -> list[range]:
    size = max(1, min(most, count // CHUNKS))
    return [range(at, min(at + size, count)) for at in range(0, count, size)]


def _finish(results: Iterator[object]) -> None:
    for _ in results:
        pass


def _spill(
    store: Store, work: str, names: Sequence[str], partitions: int, candidates: Candidates, chunk: range
) -> None:
    parts = []
    for number in chunk:
        part = candidates(names[number])
        parts.append(part.append_column(SHARD, pa.array([number] * part.num_rows, SHARD.type)))
    table = pa.concat_tables(parts)
    values = table[VALUE.name].to_pylist()
    dealt = pa.array([int.from_bytes(value[:4], "big") % partitions for value in values], pa.int32())
    for number in sorted({0, *pc.unique(dealt).to_pylist()}):  # the first even if empty: decisions see its columns
        _put(store, f"{work}/spill/{number:05d}/{chunk.start:08d}.parquet", table.filter(pc.equal(dealt, number)))
    store.put_json(f"{work}/spilled/{chunk.start:08d}.json", {"rows": table.num_rows})


def _decide(store: Store, work: str, decide: Decide, number: int) -> None:
    place = f"{work}/spill/{number:05d}"
    parts = [_get(store, f"{place}/{name}") for name in store.names(place)]
    if parts:
        _put(store, f"{work}/verdict/{number:05d}.parquet", decide(pa.concat_tables(parts)))


def _return(store: Store, work: str, names: Sequence[str], chunk: range) -> None:
    near = [(SHARD.name, ">=", chunk.start), (SHARD.name, "<", chunk.stop)]
    parts = []
    for name in store.names(f"{work}/verdict"):
        with store.open(f"{work}/verdict/{name}") as handle:
            parts.append(pq.read_table(handle, filters=near))
    table = pa.concat_tables(parts)
    for number in chunk:
        mine = table.filter(pc.equal(table[SHARD.name], number))
        _put(store, f"{work}/back/{names[number]}.parquet", mine.sort_by(ROW.name))


def _put(store: Store, path: str, table: pa.Table) -> None:
    with store.staged(path) as local:
        pq.write_table(table, local, compression="zstd")


def _get(store: Store, path: str) -> pa.Table:
    with store.open(path) as handle:
        return pq.read_table(handle)

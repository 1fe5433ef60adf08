"""The page shows how widely each subset is spread over the pool's cells, and pictures of cells."""

import math
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa

from curate.report.page import write_page
from curate.schema import KEY, TableSpec
from curate.store import Store
from tests.emit.pool import TABLES, make_pool, recipe_with, selected


def test_spread_and_pictures_are_those_of_the_cells(tmp_path: Path) -> None:
    """Guards the facts of a choice: cells covered, the effective number of them, and the rows that stand in each."""
    store = Store(str(tmp_path))
    shards = make_pool(store, shards=2)
    members, _ = selected(store, shards, recipe_with({"wordy": {"where": "word_count >= 3"}}))
    schema = pa.schema([KEY, pa.field("cell", pa.int32()), pa.field("distance", pa.float32())])
    cells = TableSpec("cells", 1, schema, {})
    pool, wordy = Counter[int](), Counter[int]()
    for shard in shards:
        told = store.read(members["wordy"], shard.name).to_pylist()
        found = [None if row % 7 == 6 else row % 3 * (row % 2) for row in range(shard.rows)]
        away = [None if cell is None else row / 100 for row, cell in enumerate(found)]
        keys = [row["key"] for row in told]
        store.write(cells, shard, pa.table([keys, found, away], schema=schema), aligned_with=TABLES[0])
        pool.update(cell for cell in found if cell is not None)
        wordy.update(cell for cell, row in zip(found, told, strict=True) if cell is not None and row["member"])
    page = write_page(store, [*TABLES, cells, *members.values()], [shard.name for shard in shards])
    for name, counts in (("the pool", pool), ("wordy", wordy)):
        total = counts.total()
        effective = math.exp(-sum(count / total * math.log(count / total) for count in counts.values()))
        numbers = f"<td class=n>{total:,}<td class=n>{len(counts):,}<td class=n>{effective:,.1f}"
        assert f"<tr><td>{name}{numbers}" in page
    order = [(int(cell), int(rows)) for cell, rows in re.findall(r"cell (\d+): (\d+) rows", page)]
    assert order == sorted(pool.items(), key=lambda item: (-item[1], item[0])) and len(order) == 3

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


def test_shares_of_seed_sets_are_those_of_each_subset(tmp_path: Path) -> None:
    """Guards which seed set a subset owes its rows to: rows of several sets count for each, others for none."""
    store = Store(str(tmp_path))
    shards = make_pool(store, shards=2)
    members, _ = selected(store, shards, recipe_with({"wordy": {"where": "word_count >= 3"}}))
    fields = [pa.field("is_retrieved", pa.bool_()), pa.field("retrieved_by", pa.list_(pa.string()))]
    spec = TableSpec("retrieved", 1, pa.schema([KEY, *fields]), {})
    counts = {"the pool": Counter[str](), "wordy": Counter[str]()}
    for shard in shards:
        told = store.read(members["wordy"], shard.name).to_pylist()
        sets = [[], ["birds & bees"], ["birds & bees", "cars"], []]
        found = [sets[row % 4] for row in range(shard.rows)]
        columns = [[row["key"] for row in told], [bool(one) for one in found], found]
        store.write(spec, shard, pa.table(columns, schema=spec.schema), aligned_with=TABLES[0])
        for by, row in zip(found, told, strict=True):
            for name in ("the pool", "wordy") if row["member"] else ("the pool",):
                counts[name].update([*by, *(["any"] if by else [])])
    page = write_page(store, [*TABLES, spec, *members.values()], [shard.name for shard in shards])
    for name, held in counts.items():
        assert held["cars"]
        for one, shown in (("birds & bees", "birds &amp; bees"), ("cars", "cars")):
            share = f"<td class=n>{held[one]:,}<td class=n>{100 * held[one] / held['any']:.1f} %"
            assert f"<tr><td>{name}<td>{shown}{share}" in page

"""Who is a copy of whom: groups followed over rules, and a page that shows them and believes no caption."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from curate.catalog import open_catalog
from curate.report.copies import copies_html, group_of, print_copies, write_group
from curate.rows import recall_path
from curate.schema import KEY, TableSpec, inputs_of
from curate.store import Store
from tests.emit.pool import SAMPLES, TABLES, make_pool

FIELDS = [
    pa.field("is_duplicate", pa.bool_()), pa.field("duplicate_of", pa.string()),
    pa.field("duplicate_kind", pa.string()), pa.field("duplicate_similarity", pa.float32()),
    pa.field("duplicate_reason", pa.string()), pa.field("duplicate_group", pa.string()),
]  # fmt: skip
COPIES = TableSpec("duplicates", 1, pa.schema([KEY, *FIELDS]), inputs=inputs_of(TABLES))


def _pool(store: Store) -> tuple[list[str], list[str]]:
    """(shards, keys): of the rows with an image, 1 → 0 by sha256, 0 and 3 → 2 by pHash; all others are alone."""
    shards = make_pool(store, shards=2)
    rows = [row for shard in shards for row in store.read(TABLES[1], shard.name, ["status"]).to_pylist()]
    keys = [row["key"] for row in rows]
    fine = [row["key"] for row in rows if row["status"] == "ok"]
    told = {
        fine[1]: (True, fine[0], "sha256", 1.0, "same sha256", fine[0]),
        fine[0]: (True, fine[2], "image_phash", 0.95, "near <b>", fine[2]),
        fine[3]: (True, fine[2], "image_phash", 0.97, "near", fine[2]),
        fine[2]: (False, None, None, None, None, fine[2]),
    }
    nothing = (False, None, None, None, None, None)
    at = 0
    for shard in shards:
        mine = keys[at : at + shard.rows]
        at += shard.rows
        table = [dict(zip(COPIES.schema.names, (key, *told.get(key, nothing)), strict=True)) for key in mine]
        store.write(COPIES, shard, pa.Table.from_pylist(table, schema=COPIES.schema), SAMPLES)
    return [shard.name for shard in shards], fine


@pytest.mark.parametrize("asked", [0, 1, 2, 3])
def test_a_group_is_followed_from_rule_to_rule(tmp_path: Path, asked: int) -> None:
    """Guards against a copy whose kept row another rule removed, and that is told as a group of its own."""
    store = Store(str(tmp_path))
    shards, keys = _pool(store)
    with open_catalog(store, [*TABLES, COPIES], shards) as connection:
        found = group_of(connection, keys[asked])
        assert group_of(connection, keys[4]) == []
    assert [one.key for one in found] == [keys[2], keys[1], keys[3], keys[0]]  # what stays first, then by similarity
    assert found[0].words.startswith("kept") and "dropped by sha256, similarity 1.0000" in found[1].words
    out = io.StringIO()
    print_copies(Console(file=out, width=400), found)
    for one in found:
        assert one.key in out.getvalue() and str(one.url) in out.getvalue()
    page = write_group(store, keys[asked], found)
    assert page.count("<figure>") == page.count("data:image/jpeg;base64,") == 4
    assert "near &lt;b&gt;" in page and "<b>" not in page


def test_the_report_tells_groups_and_recall(tmp_path: Path) -> None:
    """Guards against a recall that is measured and never shown."""
    store = Store(str(tmp_path))
    shards, keys = _pool(store)
    store.put_json(recall_path(COPIES), {
        "1:embedding_sscd": {"rows": 100, "true": 50, "found": 49, "rate": 0.98, "at_least": float(np.float32(0.895))}
    })  # fmt: skip
    with open_catalog(store, [*TABLES, COPIES], shards) as connection:
        page = "".join(copies_html(store, connection, [*TABLES, COPIES]))
    assert "embedding_sscd: 49 of 50 near pairs of 100 sampled rows found, recall 0.9800, at least 0.8950" in page
    assert f"2 copies of {keys[2]}" in page and f"1 copies of {keys[0]}" in page
    assert page.count("<figure>") == 3 + 2

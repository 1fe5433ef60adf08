"""The page shows where subsets agree: every combination counted, every two compared."""

import re
from collections import Counter
from pathlib import Path

from curate.catalog import open_catalog
from curate.report.agreement import agreement
from curate.report.page import write_page
from curate.store import Store
from tests.emit.pool import TABLES, make_pool, recipe_with, selected

WAYS = {
    "light_vlm": {"where": "word_count >= 3"}, "light_threshold": {"where": "score > 0.4"},
    "light_share": {"keep_top": {"by": "score", "fraction": 0.503}}, "none": {"where": "score > 5"},
}  # fmt: skip


def test_agreement_counts_what_the_tables_say(tmp_path: Path) -> None:
    """Guards against overlaps of other rows than those chosen, lost combinations, and a crash on an empty subset."""
    store = Store(str(tmp_path))
    shards = make_pool(store, shards=2)
    members, _ = selected(store, shards, recipe_with(WAYS))
    chosen: dict[str, set[str]] = {
        name: {
            row["key"] for shard in shards for row in store.read(spec, shard.name).to_pylist() if row["member"]
        }
        for name, spec in members.items()
    }  # fmt: skip
    combinations = Counter(
        tuple(name for name in WAYS if key in chosen[name]) for key in set.union(*chosen.values())
    )  # fmt: skip
    tables = [*TABLES, *members.values()]
    names = [shard.name for shard in shards]
    with open_catalog(store, tables, names) as connection:
        found = agreement(connection, list(WAYS))
    assert found.rows == combinations and len(combinations) >= 4
    both, either = (chosen["light_vlm"] & chosen["light_share"]), (chosen["light_vlm"] | chosen["light_share"])
    assert found.jaccard("light_vlm", "light_share") == len(both) / len(either)
    assert found.jaccard("light_share", "none") == 0.0 and found.size("none") == 0
    page = write_page(store, tables, names)
    for combination, rows in combinations.items():
        dots = "".join("<td>●" if name in combination else "<td><i>○</i>" for name in WAYS)
        assert f"<tr>{dots}<td class=n>{rows:,}<td>" in page
        assert f"{' and '.join(combination)} alone: {rows:,} rows" in page
    assert f">{len(both) / len(either):.3f}" in page
    assert len(re.findall(r"<td class=n style", page)) == 12  # every two of four, on both sides

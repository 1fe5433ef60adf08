"""A release in MetaCLIP's layout: `<shard % 100>/<shard>.tar` of `<uuid>.json` and `<uuid>.jpeg` in turn.

As MetaCLIP's loader expects it (facebookresearch/MetaCLIP metaclip/pipeline.py; RECIPES 6): uuid is the first 24 digits
of the URL's sha224, and the JSON holds `texts`, a list of [key, text]. A picture that stands there with several texts
is one entry with all of them. Unlike the other exports this one copies pictures, a tar at a time. One that is no JPEG
keeps its bytes under the name `.jpeg`: who reads them goes by their content. Rows without a text are left out. Tars of
an earlier, longer export in the same folder are deleted.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from curate.catalog import literal
from curate.emit.verify import refuse_withdrawn
from curate.errors import PlanError
from curate.store import Store
from curate.tar import TarWriter

PICTURES_PER_TAR = 6_580  # theirs: 400 M in 60,800 tars


def export_metaclip(release: str, subset: str, out: Path) -> Path:
    """Write the tars below `out`; returns `out`. Raises PlanError for an unknown subset, ReleaseError if withdrawn."""
    store = Store(release)
    note = store.get_json("release.json")
    if note is None or subset not in note["subsets"]:
        known = ", ".join(note["subsets"]) if note else "no release.json is there"
        raise PlanError(f"{release}: no subset {subset} ({known})")
    refuse_withdrawn(store, "")
    tars = 0
    for number, rows in enumerate(_pictures(store, subset)):
        path = _place(out, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        with partial.open("wb") as stream:
            tar = TarWriter(stream)
            for url, texts, data in _read(store, subset, rows):
                uuid = hashlib.sha224(url.encode()).hexdigest()[:24]
                tar.add(f"{uuid}.json", json.dumps({"url": url, "texts": texts}, ensure_ascii=False).encode())
                tar.add(f"{uuid}.jpeg", data)
            tar.finish()
        partial.replace(path)
        tars = number + 1
    while (stale := _place(out, tars)).exists():
        stale.unlink()
        tars += 1
    return out


def _place(out: Path, number: int) -> Path:
    return out / str(number % 100) / f"{number}.tar"


def _pictures(store: Store, subset: str) -> Iterator[pa.Table]:
    """(url, texts, tar, offset, length) of each URL, by the place of its first row; DuckDB spills what is too much."""
    with duckdb.connect() as connection:
        manifest = store.full("manifest.parquet")
        if store.is_local:
            manifest = literal(manifest)
        else:
            connection.register_filesystem(store.fs)
        found = connection.execute(
            """
            SELECT url, texts, place.tar, place.start, place.length FROM (
              SELECT url, list([key, text] ORDER BY key) AS texts,
                min({tar: tar, start: "offset", length: length}) AS place
              FROM read_parquet(?) WHERE subset = ? AND text IS NOT NULL GROUP BY url
            ) ORDER BY place.tar, place.start
            """,
            [manifest, subset],
        )
        reader: Any = found.to_arrow_reader(PICTURES_PER_TAR)
        for batch in reader:
            if batch.num_rows:
                yield pa.Table.from_batches([batch])


def _read(store: Store, subset: str, rows: pa.Table) -> Iterator[tuple[str, list[list[str]], bytes]]:
    """The rows with their bytes, a tar of the release at a time."""
    plain: list[dict[str, Any]] = rows.to_pylist()
    for tar in dict.fromkeys(row["tar"] for row in plain):
        mine = [row for row in plain if row["tar"] == tar]
        places = [row["start"] for row in mine], [row["length"] for row in mine]
        for row, data in zip(mine, store.read_ranges(f"{subset}/{tar}", *places), strict=True):
            yield row["url"], row["texts"], data

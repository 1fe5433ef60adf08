"""What was shipped comes first: rows of the last release are kept rather than their newer copies.

A release is made from a `duplicates` table, so the table's identity must not depend on the release that it makes, or
no second run would find its work done. The table that made a release carries `base`, the hash of its rules, pool and
inputs. The newest release with our base was made from the very table that we are about to name: we take over what it
preferred. Without one, the pool, the rules or the scores are new since, and we prefer the latest release.

    first run    no release           prefers nothing    makes 0001
    again        0001 has our base    prefers nothing    same table: nothing to do
    new shards   0001 has another     prefers 0001       makes 0002
    again        0002 has our base    prefers 0001       same table: nothing to do

Released rows are read from the release's member tables, which are aligned with the shards; the newer shards have none.
A release of other `samples` (another `where` or `rows_per_shard`) has shards of the same names with other rows, and
prefers nothing here.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curate.errors import StoreError
from curate.rows import SAMPLES
from curate.store import Store

RELEASES = "releases"
MEMBER = "member_"


def preferred_release(store: Store, base: str) -> str | None:
    """The release whose rows come first for a table with this base; None: there is none."""
    for name in reversed(store.names(RELEASES)):
        note = store.get_json(f"{RELEASES}/{name}/release.json") if name[:4].isdigit() else None
        settings = (note or {}).get("tables", {}).get("duplicates", {}).get("settings", {})
        if settings.get("base") == base:
            released: str | None = settings.get("released")
            return released
    try:
        return store.get_bytes(f"{RELEASES}/latest").decode().strip() or None
    except FileNotFoundError:
        return None


def member_folders(store: Store, release: str, samples: str) -> tuple[str, ...]:
    """Folders of the release's member tables; none where it was made of `samples` of another fingerprint.

    Raises StoreError when they are gone.
    """
    tables = (store.get_json(f"{RELEASES}/{release}/release.json") or {}).get("tables", {})
    if tables.get(SAMPLES, {}).get("fingerprint") != samples:
        return ()
    folders = tuple(f"{name}/{spec['fingerprint']}" for name, spec in tables.items() if name.startswith(MEMBER))
    for folder in folders:
        if not store.names(folder):
            raise StoreError(
                f"{store.url(folder)} is gone, which says what {release} released; restore it, or write "
                "prefer_released: false"
            )
    return folders


def released_rows(store: Store, folders: tuple[str, ...], shard: str, rows: npt.NDArray[np.int64]) -> pa.Array:
    """bool[len(rows)]: which of these rows of a shard some subset of the release has."""
    held = np.zeros(len(rows), np.bool_)
    for folder in folders:
        path = f"{folder}/{shard}.parquet"
        if store.exists(path):
            with store.open(path) as handle:
                members = pq.read_table(handle, columns=["member"]).column("member")
            held |= np.asarray(members.fill_null(False))[rows]
    return pa.array(held)

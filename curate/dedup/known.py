"""What an earlier run learned of a rule's rows, so that a refresh compares new rows with all and old pairs not again.

    _near/<identity>/<run>/<shard>.npz           `taking`: rows that were compared; `row`, `group`, `similarity` of
                                                 those with an edge, `group` as the run's number of its lowest row
    _near/<identity>/<run>/nearest/<part>.npz    DINOv2's form instead: `row`: rows that were compared in a partition;
                                                 `pairs`, `similarity`: each with its nearest k; the run's numbers
    _near/<identity>/<run>/pool.json             the run's shards in order and their rows; written last
    _near/<identity>/named.json                  written anew by every run that names the identity

`identity` names what is compared and how (`identity_of`), not the pool: pairs of two rows do not depend on a third. A
row whose group has lost a member since (another rule removed it) is compared again, for the group may have fallen
apart; so is one that has lost a neighbour, for the next one is not known. So the groups are those of a run from
scratch, whatever the history. An identity that no run has named for a month (another threshold, cells of a pool that
has doubled since, another version) is swept by the next run; other recipes at the same root name theirs.

It holds row numbers and groups, no hashes, vectors or keys.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.presence import written_at
from curate.schema import Shard, fingerprint
from curate.stage import Map
from curate.store import Store
from curate.vectors import finish, get_arrays, put_arrays

FOLDER = "_near"
VERSION = 3
NAMED = "named.json"
KEPT_S = 30 * 86_400.0  # by the store's clock

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Known:
    """An earlier run, seen from the pool of this one. `starts`: its number of each shard's first row; `now`: ours.

    Rows and groups are translated to our row numbers. One (for a group, its lowest row) that is in a shard that is gone
    gets a negative number.
    """

    store: Store
    folder: str
    names: tuple[str, ...]
    starts: tuple[int, ...]
    now: tuple[int, ...]  # -1: the shard is not in the pool

    def of(self, shard: str) -> tuple[IntArray, IntArray, npt.NDArray[np.float32]]:
        """(rows that were compared, group of each, similarity of each; a row without an edge is its own group)."""
        if shard not in self.names:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        found = get_arrays(self.store, f"{self.folder}/{shard}.npz")
        taking = found["taking"].astype(np.int64)
        start = self.starts[self.names.index(shard)]
        group, similarity = taking + start, np.full(len(taking), -1, np.float32)
        at = np.searchsorted(taking, found["row"])
        group[at], similarity[at] = found["group"], found["similarity"]
        return taking, self._translated(group), similarity

    def gone(self) -> IntArray:
        """Groups that had a row in a shard that is gone."""
        lost = [self.of(name)[1] for name, now in zip(self.names, self.now, strict=True) if now < 0]
        return np.unique(np.concatenate([np.empty(0, np.int64), *lost]))

    def nearest(self, part: int) -> tuple[IntArray, IntArray, npt.NDArray[np.float32]]:
        """(rows that were compared in a partition, pairs int64[M, 2] of neighbours, similarity of each)."""
        found = get_arrays(self.store, f"{self.folder}/nearest/{part:05d}.npz")
        return self._translated(found["row"]), self._translated(found["pairs"]), found["similarity"]

    def _translated(self, rows: IntArray) -> IntArray:
        at = np.searchsorted(self.starts, rows, "right") - 1
        now = np.array(self.now, np.int64)[at]
        return np.where(now < 0, -rows - 2, now + rows - np.array(self.starts, np.int64)[at])


def identity_of(*parts: object) -> str:
    """Names what is compared and how."""
    return f"{FOLDER}/{fingerprint('near', VERSION, *parts)}"


def name_identity(store: Store, identity: str) -> None:
    """Say that it is in use."""
    store.put_json(f"{identity}/{NAMED}", {})


def sweep_identities(store: Store) -> int:
    """Remove those that were named KEPT_S before the last one was, or by none that says so; returns how many."""
    named = {identity: _named_at(store, f"{FOLDER}/{identity}/{NAMED}") for identity in store.names(FOLDER)}
    latest = max(named.values(), default=0.0)
    old = [identity for identity, at in named.items() if latest - at > KEPT_S]
    for identity in old:
        store.remove_tree(f"{FOLDER}/{identity}")
    return len(old)


def _named_at(store: Store, path: str) -> float:
    try:
        return written_at(store.fs.info(store.full(path)))
    except FileNotFoundError:
        return 0.0


def digest_of(*arrays: npt.NDArray[Any]) -> str:
    """Names arrays by their values, for `identity_of`."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def known_to(store: Store, identity: str, note: str, shards: Sequence[Shard]) -> Known | None:
    """The earlier run that knows most of these shards; the same one whenever it is asked, by the note it leaves.

    Where another run has forgotten that one since, what was found beside the note is removed, to be found anew.
    """
    name_identity(store, identity)
    starts = dict(
        zip((shard.name for shard in shards), np.cumsum([0, *(s.rows for s in shards)]).tolist(), strict=False)
    )
    told = store.get_json(note)
    if told is not None and told["run"] and not store.exists(f"{identity}/{told['run']}/pool.json"):
        for made in ("taking", "dealt", "edges", "near.npz", "groups", "nearest"):  # with what is known no more
            store.remove_tree(f"{note.rpartition('/')[0]}/{made}")
        told = None
    if told is None:
        best = (0, "")
        for run in runs_of(store, identity):
            pool = store.get_json(f"{identity}/{run}/pool.json") or {"shards": []}
            best = max(best, (sum(rows for name, rows in pool["shards"] if name in starts), run))
        told = {"run": best[1]}
        store.put_json(note, told)
    if not told["run"]:
        return None
    folder = f"{identity}/{told['run']}"
    pool = store.get_json(f"{folder}/pool.json")
    names = tuple(name for name, _ in pool["shards"])
    before = np.cumsum([0, *(rows for _, rows in pool["shards"])]).tolist()[:-1]
    return Known(store, folder, names, tuple(before), tuple(starts.get(name, -1) for name in names))


def keep_groups(store: Store, identity: str, run: str, work: str, shards: Sequence[Shard], map_items: Map) -> None:
    """Keep the groups that a run left below its folder `work`."""
    there = set(store.names(f"{identity}/{run}"))
    todo = [shard.name for shard in shards if f"{shard.name}.npz" not in there]
    finish(map_items(partial(_keep, store, work, f"{identity}/{run}"), todo))


def keep_neighbours(store: Store, identity: str, run: str, work: str, map_items: Map) -> None:
    """Keep the nearest rows that a run of DINOv2's form left below its folder `work`."""
    there = set(store.names(f"{identity}/{run}/nearest"))
    todo = [name for name in store.names(f"{work}/nearest") if name not in there]
    finish(map_items(partial(_copy, store, f"{work}/nearest", f"{identity}/{run}/nearest"), todo))


def publish(store: Store, identity: str, run: str, shards: Sequence[Shard]) -> None:
    """Let later runs know what this one kept, now that it is all there."""
    store.put_json(f"{identity}/{run}/pool.json", {"shards": [[shard.name, shard.rows] for shard in shards]})


def forget_older(store: Store, identity: str, run: str) -> None:
    """Remove what other runs kept of the same identity; not before this one can do without."""
    for other in runs_of(store, identity):
        if other != run:
            store.remove_tree(f"{identity}/{other}")


def runs_of(store: Store, identity: str) -> list[str]:
    """Runs that kept something under it."""
    return [name for name in store.names(identity) if name != NAMED]


def _copy(store: Store, work: str, folder: str, name: str) -> None:
    store.put_bytes(f"{folder}/{name}", store.get_bytes(f"{work}/{name}"))


def _keep(store: Store, work: str, folder: str, shard: str) -> None:
    found = get_arrays(store, f"{work}/groups/{shard}.npz")
    put_arrays(
        store, f"{folder}/{shard}.npz", taking=get_arrays(store, f"{work}/taking/{shard}.npz")["row"],
        row=found["row"], group=found["group"], similarity=found["similarity"],
    )  # fmt: skip

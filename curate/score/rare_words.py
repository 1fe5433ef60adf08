"""`rare_words`: how many words and pairs of words of a text are not among the commonest of the pool, as ALIGN asks.

ALIGN (Jia et al. 2021, arXiv 2102.05918, §3) drops texts with a token outside of the 100 million commonest unigrams and
bigrams of its raw texts. A word here is what stands between white space, in lower case, a pair two that follow one
another; both are counted over all texts of the pool, in one list. Those that are as frequent as the last of the
commonest are common too. Words are known by 64 bits of their hash.

Three passes over shards: counts by hash in partitions, the commonest of all, and each text against them. A worker holds
the commonest in 8 bytes each: 0.8 GB for ALIGN's 100 million. Texts of null have no value; no row is dropped here.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from curate.errors import ConfigError
from curate.metrics import Ticker
from curate.schema import KEY, Shard, TableSpec, inputs_of, pool_digest
from curate.stage import CrossStep, Map
from curate.store import Store
from curate.vectors import Int64, UInt64, chunks_of, finish, get_arrays, put_arrays

COMMONEST = 100_000_000  # recalled from the paper
ROWS_PER_PARTITION = 2_000_000  # about 20 million different words and pairs: 320 MB while they are summed
SHARDS_PER_CHUNK = 20  # 200,000 texts have some 2 million different words and pairs


class RareWordsStep(CrossStep):
    """Writes `scores_<entry>` with `rare_words`, int32. Setting: `commonest`."""

    name = "rare_words"

    def __init__(self, name: str, entry: Mapping[str, Any], samples: TableSpec, shards: Sequence[Shard]) -> None:
        unknown = sorted(set(entry) - {"scorer", "commonest"})
        if unknown:
            raise ConfigError(f"score.{name}.{unknown[0]}: unknown key; {self.name} takes commonest")
        self._commonest = entry.get("commonest", COMMONEST)
        if not isinstance(self._commonest, int) or self._commonest < 1:
            raise ConfigError(f"score.{name}.commonest: expected a number of words and pairs, found {self._commonest}")
        settings = {"scorer": self.name, "commonest": self._commonest, "pool": pool_digest(shards)}
        schema = pa.schema([KEY, pa.field(self.name, pa.int32())])
        self._samples = samples
        self._spec = TableSpec(f"scores_{name}", 1, schema, settings, inputs_of([samples]))
        self.tables = (self._spec,)

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every shard has its numbers."""
        return {shard.name for shard in shards} <= store.done(self._spec)

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Count; returns how many texts have a rare word or pair."""
        work = f"_work/{self._spec.name}/{self._spec.fingerprint}"
        names = [shard.name for shard in shards]
        partitions = -(-sum(shard.rows for shard in shards) // ROWS_PER_PARTITION)
        chunks = chunks_of(len(names), SHARDS_PER_CHUNK)
        if not store.exists(f"{work}/common.npz"):
            counted = set(store.names(f"{work}/counted"))
            todo = [chunk for chunk in chunks if f"{chunk.start:08d}.json" not in counted]
            finish(map_items(partial(_count, store, self._samples, work, names, partitions), todo))
            put_arrays(store, f"{work}/common.npz", hashes=_common(store, work, partitions, self._commonest, map_items))
        counts: Counter[str] = Counter()
        commit = partial(_commit, store, self._spec, self._samples, work)
        for rare in map_items(commit, [shards[chunk.start : chunk.stop] for chunk in chunks]):
            counts["texts with a rare word"] += rare
            ticker.advance(1)
        store.remove_tree(work)
        return counts


def words_of(text: str) -> Iterator[str]:
    """Words and pairs of words of a text, in lower case."""
    words = text.lower().split()
    yield from words
    yield from (f"{one} {next_}" for one, next_ in pairwise(words))


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def _texts(store: Store, samples: TableSpec, shard: str) -> list[str | None]:
    texts: list[str | None] = store.read(samples, shard, [KEY.name, "text"]).column("text").to_pylist()
    return texts


def _count(store: Store, samples: TableSpec, work: str, names: Sequence[str], partitions: int, chunk: range) -> None:
    found: Counter[str] = Counter()
    for number in chunk:
        for text in _texts(store, samples, names[number]):
            found.update(words_of(text or ""))
    hashes = np.array([_hash(word) for word in found], np.uint64)
    counts = np.array(list(found.values()), np.int64)
    dealt = hashes % np.uint64(partitions)
    for part in range(partitions):
        mine = dealt == part
        put_arrays(store, _spilled(work, part, chunk.start), hashes=hashes[mine], counts=counts[mine])
    store.put_json(f"{work}/counted/{chunk.start:08d}.json", {"words": len(found)})


def _spilled(work: str, part: int, chunk: int) -> str:
    return f"{work}/spill/{part:05d}/{chunk:08d}.npz"


def _summed(store: Store, work: str, part: int) -> tuple[UInt64, Int64]:
    """Hashes of a partition, in order, and how often each stands in the pool."""
    place = f"{work}/spill/{part:05d}"
    held = [get_arrays(store, f"{place}/{name}") for name in store.names(place)]
    hashes, places = np.unique(np.concatenate([one["hashes"] for one in held]), return_inverse=True)
    counts = np.zeros(len(hashes), np.int64)
    np.add.at(counts, places, np.concatenate([one["counts"] for one in held]))
    return hashes, counts


def _histogram(store: Store, work: str, part: int) -> tuple[Int64, Int64]:
    counts, times = np.unique(_summed(store, work, part)[1], return_counts=True)
    return counts, times


def _at_least(store: Store, work: str, least: int, part: int) -> UInt64:
    hashes, counts = _summed(store, work, part)
    return hashes[counts >= least]


def _common(store: Store, work: str, partitions: int, commonest: int, map_items: Map) -> UInt64:
    """Hashes of the commonest, in order: of all that are as frequent as the one at place `commonest`."""
    times: Counter[int] = Counter()
    for counts, seen in map_items(partial(_histogram, store, work), range(partitions)):
        times.update(dict(zip(counts.tolist(), seen.tolist(), strict=True)))
    least, so_far = 1, 0
    for count in sorted(times, reverse=True):
        so_far += times[count]
        if so_far >= commonest:
            least = count
            break
    parts = list(map_items(partial(_at_least, store, work, least), range(partitions)))
    return np.sort(np.concatenate([np.empty(0, np.uint64), *parts]))


def _commit(store: Store, spec: TableSpec, samples: TableSpec, work: str, shards: Sequence[Shard]) -> int:
    todo = [shard for shard in shards if not store.has(spec, shard.name)]
    common = get_arrays(store, f"{work}/common.npz")["hashes"] if todo else np.empty(0, np.uint64)
    rare = 0
    for shard in todo:
        table = store.read(samples, shard.name, [KEY.name, "text"])
        texts = [None if text is None else list(words_of(text)) for text in table.column("text").to_pylist()]
        words = sorted({word for found in texts if found for word in found})
        hashes = np.array([_hash(word) for word in words], np.uint64)
        places = np.minimum(np.searchsorted(common, hashes), max(0, len(common) - 1))
        known = common[places] == hashes if len(common) else np.zeros(len(hashes), bool)
        missing = {word for word, one in zip(words, known.tolist(), strict=True) if not one}
        numbers = [None if found is None else sum(word in missing for word in found) for found in texts]
        rare += sum(bool(number) for number in numbers)
        store.write(spec, shard, pa.table([table.column(KEY.name), numbers], schema=spec.schema), aligned_with=samples)
    return rare

"""The order of a release: a seeded permutation of the chosen samples, the same on every machine and for any workers.

A subset of at most `group_samples` is one exact permutation: samples sorted by BLAKE2b(seed, subset, key). A larger one
is shuffled on two levels: source shards are dealt at random into groups, and each group is permuted exactly; a group is
what one task holds at a time. Pure functions over names and numbers.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SHARDS_PER_CHUNK = 8  # read by one task: enough to hide a task's cost, few enough to spread a small pool


@dataclass(frozen=True)
class Chunk:
    """Source shards that are read together."""

    number: int
    shards: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Chunks whose samples of one subset are permuted as one, and the tars they fill."""

    subset: str
    number: int
    chunks: tuple[int, ...]
    samples: int
    first_tar: int
    tar_samples: tuple[int, ...]  # of each tar, in order

    @property
    def tars(self) -> int:
        """Tars of this group."""
        return len(self.tar_samples)


def deal(names: Sequence[str], rows: int, seed: int, group_samples: int) -> list[Chunk]:
    """Source shards in random order, cut into chunks. `rows` is the size of the largest shard."""
    order = sorted(names, key=lambda name: (_hash(f"{seed}\0shard\0{name}"), name))
    size = max(1, min(_SHARDS_PER_CHUNK, group_samples // max(1, rows)))
    parts = [tuple(order[at : at + size]) for at in range(0, len(order), size)]
    return [Chunk(number, part) for number, part in enumerate(parts)]


def group(
    subset: str,
    chunk_samples: Sequence[int],
    chunk_bytes: Sequence[int],
    group_samples: int,
    samples_per_tar: int,
    bytes_per_tar: int | None,
    min_tars: int,
) -> list[Group]:
    """Runs of chunks of about `group_samples` samples each, and how many tars each fills.

    Tars of a group differ by at most one sample, so that no worker is left with a crumb. `bytes_per_tar` is an average:
    the order is random, so tars of equal counts are of nearly equal size.
    """
    total = sum(chunk_samples)
    wanted = -(-total // group_samples)
    groups: list[Group] = []
    first_tar, seen, chunks = 0, 0, list[int]()
    for number, samples in enumerate(chunk_samples):
        if samples:
            chunks.append(number)
        seen += samples
        last = number == len(chunk_samples) - 1
        if not chunks or not (last or seen * wanted >= total * (len(groups) + 1)):
            continue
        here = sum(chunk_samples[chunk] for chunk in chunks)
        size = sum(chunk_bytes[chunk] for chunk in chunks)
        tars = max(-(-here // samples_per_tar), -(-min_tars * here // total))
        if bytes_per_tar is not None:
            tars = max(tars, -(-size // bytes_per_tar))
        counts = even(here, min(tars, here))
        groups.append(Group(subset, len(groups), tuple(chunks), here, first_tar, counts))
        first_tar += len(counts)
        chunks = []
    return groups


def even(samples: int, parts: int) -> tuple[int, ...]:
    """`samples` in `parts` numbers that differ by at most one, larger ones first."""
    each, more = divmod(samples, parts)
    return tuple(each + (part < more) for part in range(parts))


def permutation(keys: Sequence[str], seed: int, subset: str) -> np.ndarray:
    """Row numbers, int64 (n,), in the order of the release. Equal keys stay side by side."""
    prefix = f"{seed}\0{subset}\0"
    digests = np.frombuffer(b"".join(_hash(prefix + key) for key in keys), dtype=">u8").reshape(-1, 2)
    return np.lexsort((digests[:, 1], digests[:, 0]))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()

"""Phrases of whole words in many texts at once: a join of words by number, for entries that stand between spaces.

What begins and ends at a space is a run of words between spaces, so substring search becomes a lookup of word numbers:
words of a batch are numbered once, phrases followed word by word through sorted edges. Twice as fast as Aho-Corasick
over the same entries (bench_retrieve), and as exact: words are compared as bytes, spaces in a row hold empty words. It
refuses nothing; a text of one call must stay below 2 GB.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int64 = npt.NDArray[np.int64]

FILTER_BITS_PER_EDGE = 16  # of 8 bits each: 6 % of the words that follow no phrase pass the filter to a binary search
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: multiplicative hashing (Knuth, vol. 3, 6.4)


class Phrases:
    """A list of phrases, bytes of UTF-8; 500,000 take 3 s to number and 150 MB."""

    def __init__(self, phrases: Sequence[bytes]) -> None:
        """`phrases` must be different; phrase i is found as i."""
        split = [phrase.split(b" ") for phrase in phrases]
        # A word carries the space behind it, as it does in a text: words then lie there one behind the other.
        self._words = {word + b" ": number for number, word in enumerate(dict.fromkeys(chain.from_iterable(split)))}
        self._unknown = len(self._words)
        lengths = np.fromiter(map(len, split), np.int64, len(split))
        numbers = np.fromiter(
            (self._words[word + b" "] for word in chain.from_iterable(split)), np.int64, int(lengths.sum())
        )
        starts = np.cumsum(lengths) - lengths
        single = np.flatnonzero(lengths == 1)
        self._single = np.full(self._unknown + 1, -1, np.int64)
        self._single[numbers[starts[single]]] = single
        self._opens = np.zeros(self._unknown + 1, bool)
        longer = np.flatnonzero(lengths > 1)
        self._opens[numbers[starts[longer]]] = True
        self._levels: list[_Edges] = []
        node = numbers[starts[longer]]
        while len(longer):
            depth = len(self._levels) + 1
            keys, node = np.unique(node * self._unknown + numbers[starts[longer] + depth], return_inverse=True)
            ends = lengths[longer] == depth + 1
            phrase = np.full(len(keys), -1, np.int64)
            phrase[node[ends]] = longer[ends]
            self._levels.append(_Edges.of(keys, phrase))
            longer, node = longer[~ends], node[~ends]

    def find(self, text: bytes) -> tuple[Int64, Int64]:
        """(phrase, byte at which it starts) of every place, in no order. The text starts and ends with a space."""
        spaces = np.flatnonzero(np.frombuffer(text, np.uint8) == ord(" "))
        starts = (spaces + 1).astype(np.int32)
        words = pa.BinaryArray.from_buffers(
            pa.binary(), len(starts) - 1, [None, pa.py_buffer(starts), pa.py_buffer(text)]
        ).dictionary_encode()
        of_word = [self._words.get(word, self._unknown) for word in words.dictionary.to_pylist()]
        numbers = np.append(np.array(of_word, np.int64)[np.asarray(words.indices)], self._unknown)
        phrase = self._single[numbers]
        place = np.flatnonzero(phrase >= 0)
        found, places = [phrase[place]], [place]
        place = np.flatnonzero(self._opens[numbers])
        node = numbers[place]
        for depth, edges in enumerate(self._levels, start=1):
            following = numbers[np.minimum(place + depth, len(numbers) - 1)]
            known = np.flatnonzero(following < self._unknown)
            step, node = edges.follow(node[known] * self._unknown + following[known])
            place = place[known[step]]
            phrase = edges.phrase[node]
            found.append(phrase[phrase >= 0])
            places.append(place[phrase >= 0])
        return np.concatenate(found), starts[np.concatenate(places)].astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Edges:
    """Steps of one depth. `keys` int64[e]: what was read so far × words + the word that follows, ascending. `phrase`
    int64[e]: which ends there, -1 for none. `passing`: hashes of keys that are there, so that few are looked up."""

    keys: Int64
    phrase: Int64
    passing: npt.NDArray[np.bool_]
    shift: np.uint64

    @classmethod
    def of(cls, keys: Int64, phrase: Int64) -> "_Edges":
        bits = int(len(keys) * FILTER_BITS_PER_EDGE).bit_length()
        shift = np.uint64(64 - bits)
        passing = np.zeros(1 << bits, bool)
        passing[_hashed(keys, shift)] = True
        return cls(keys, phrase, passing, shift)

    def follow(self, keys: Int64) -> tuple[Int64, Int64]:
        """(which of `keys` are edges, the edges they are)."""
        some = np.flatnonzero(self.passing[_hashed(keys, self.shift)])
        edge = np.searchsorted(self.keys, keys[some])
        same = self.keys[np.minimum(edge, len(self.keys) - 1)] == keys[some]
        return some[same], edge[same]


def _hashed(keys: Int64, shift: np.uint64) -> npt.NDArray[Any]:
    return (keys.astype(np.uint64) * SPREAD) >> shift

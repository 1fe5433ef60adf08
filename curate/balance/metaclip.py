"""MetaCLIP: which entries of the metadata a caption contains, and how many captions each entry may keep.

Matching gives exactly what the published loop over all entries gives (paper 2309.16671; RECIPES section 6): by words
where an entry stands between spaces, by an Aho-Corasick automaton over UTF-8 bytes (ahocorasick-rs) where version 2
lets it touch what is beside it. Balancing draws by hash of (entry, key), so that a caption's
fate depends on neither shard nor order. It refuses to clean: matching is case-sensitive and collapses no spaces.
"""

import itertools
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import ahocorasick_rs
import numpy as np
import numpy.typing as npt

from curate.balance.phrases import Phrases
from curate.errors import PlanError

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Float64 = npt.NDArray[np.float64]

SPACED = (b",", b".", b";", b":", b"?", b"!", b"`")  # set apart by spaces on both sides before matching
PARTED, NOTHING = b"\xff", b"\xfe"  # which UTF-8 never holds
BLANKS = (b"\t", b"\n", b"\r")  # become a space
# Scripts that write without spaces, for version 2: first and last code point of each range.
UNSPACED = (
    (0x2E80, 0x2EFF),  # CJK radicals
    (0x2F00, 0x2FDF),  # Kangxi radicals
    (0x2FF0, 0x2FFF),  # ideographic description
    (0x3400, 0x4DBF),  # CJK extension A
    (0x4E00, 0x9FFF),  # CJK
    (0xF900, 0xFAFF),  # compatibility ideographs
    (0x20000, 0x2A6DF),  # extension B
    (0x2A700, 0x2EBEF),  # extensions C to F, which adjoin
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
)
PUNCTUATION = frozenset(string.punctuation + "，。、；：？！“”‘’（）【】《》〈〉「」『』～—")
CAPTIONS_PER_PASS = 1 << 16  # 70 MB for captions of 70 characters, whose common words are then looked up once
CHARACTERS_PER_PASS = 1 << 26  # of captions longer than those: at most 270 MB, far from the 2 GB that a text may have


def matches(captions: Sequence[str | None], entries: Sequence[str], version: Literal[1, 2] = 1) -> Int64:
    """(caption, entry) index pairs int64[M, 2], sorted and unique; `Matcher` is the same, built once for many calls."""
    return Matcher(entries, version).matches(captions)


class Matcher:
    """What is looked for, of one metadata list; 500,000 entries take about 4 s and 200 MB.

    Version 1: entry e is in a caption when " e " is a substring of " caption ", in which each of `, . ; : ? ! `` stands
    between spaces and tab, newline and return are spaces. Version 2 (MetaCLIP 2) leaves out the entry's leading or
    trailing space where its first or last character is punctuation or of a script without spaces. Equal entries match
    alike, each under its own index. The empty entry is in a caption with two spaces in a row (version 1, as in the
    loop); version 2 cannot place it and refuses it. None and empty captions contain nothing.
    """

    def __init__(self, entries: Sequence[str], version: Literal[1, 2] = 1) -> None:
        """Raises PlanError for another version, for an entry that is no valid text, and for "" in version 2."""
        if version not in (1, 2):
            raise PlanError(f"metaclip: version is {version!r}; expected 1 or 2")
        if version == 2 and "" in entries:
            raise PlanError(f"metaclip: entry {list(entries).index('')} is empty; version 2 needs a first character")
        self.count = len(entries)
        patterns = [_pattern(entry, version) for entry in entries]
        whole = [(pattern[1:-1], entry) for entry, pattern in enumerate(patterns) if _between_spaces(pattern)]
        touching = [(pattern, entry) for entry, pattern in enumerate(patterns) if not _between_spaces(pattern)]
        self._whole, self._touching = _Patterns(whole), _Patterns(touching)
        self._phrases = Phrases(self._whole.texts)
        # Contiguous NFA: 3 × as fast as the other NFA here, and a DFA of 500,000 entries would need gigabytes.
        self._automaton = ahocorasick_rs.BytesAhoCorasick(
            self._touching.texts, implementation=ahocorasick_rs.Implementation.ContiguousNFA
        )

    def matches(self, captions: Sequence[str | None]) -> Int64:
        """(caption, entry) index pairs int64[M, 2], sorted and unique."""
        passes = [self._pass(captions[start:stop], start) for start, stop in _passes(captions)]
        return np.concatenate(passes) if passes else np.zeros((0, 2), np.int64)

    def _pass(self, captions: Sequence[str | None], first: int) -> Int64:
        text = _spaced(captions)
        phrase, start = self._phrases.find(text)
        parted = np.flatnonzero(np.frombuffer(text, np.uint8) == PARTED[0])
        pairs = [self._whole.pairs(np.searchsorted(parted, start), phrase, self.count)]
        if self._touching.texts:
            pairs.append(self._touching.pairs(*self._touched(text), self.count))
        pair = np.sort(np.concatenate(pairs))
        pair = pair[np.concatenate(([True], pair[1:] != pair[:-1]))[: len(pair)]]
        table: Int64 = np.stack(np.divmod(pair, max(self.count, 1)), axis=1) + np.array([first, 0])
        return table

    def _touched(self, text: bytes) -> tuple[Int64, Int64]:
        """(caption, pattern) of every place where the automaton finds one."""
        find = self._automaton.find_matches_as_indexes
        found = [find(caption, overlapping=True) for caption in text.split(PARTED)]
        number = np.fromiter(map(len, found), np.int64, len(found))
        hits = itertools.chain.from_iterable(itertools.chain.from_iterable(found))
        pattern = np.fromiter(hits, np.int64, 3 * int(number.sum()))[::3]  # of (pattern, start, end)
        return np.repeat(np.arange(len(found)), number), pattern


def _passes(captions: Sequence[str | None]) -> Iterator[tuple[int, int]]:
    """Runs of captions that are matched as one text; a long caption may be a run by itself."""
    start = held = 0
    for at, caption in enumerate(captions):
        size = len(caption) if caption else 0
        if at > start and (at - start == CAPTIONS_PER_PASS or held + size > CHARACTERS_PER_PASS):
            yield start, at
            start, held = at, 0
        held += size
    if len(captions) > start:
        yield start, len(captions)


class _Patterns:
    """Different patterns in the order of their first entry, and the entries of each."""

    def __init__(self, patterns: Iterable[tuple[bytes, int]]) -> None:
        groups: dict[bytes, list[int]] = {}
        for pattern, entry in patterns:
            groups.setdefault(pattern, []).append(entry)
        self.texts = list(groups)
        # The entries of pattern p are _entries[_starts[p] : _starts[p + 1]].
        self._starts = np.cumsum([0, *map(len, groups.values())]).astype(np.int64)
        self._entries = np.fromiter(itertools.chain.from_iterable(groups.values()), np.int64)

    def pairs(self, caption: Int64, pattern: Int64, count: int) -> Int64:
        """caption × count + entry for every entry of every pattern that was found."""
        copies = self._starts[pattern + 1] - self._starts[pattern]
        offset = np.arange(int(copies.sum())) - np.repeat(np.cumsum(copies) - copies, copies)
        entry = self._entries[np.repeat(self._starts[pattern], copies) + offset]
        return np.asarray(np.repeat(caption, copies) * count + entry)


def _spaced(captions: Sequence[str | None]) -> bytes:
    """The captions as matching sees them, in UTF-8: each between spaces, SPACED set apart, BLANKS as spaces, and PARTED
    between two; NOTHING for None and "".

    All at once: replacing one by one took a tenth of the matching's time.
    """
    between = b" " + PARTED + b" "
    text = b" " + between.join([_encoded(caption) if caption else NOTHING for caption in captions]) + b" "
    for mark in SPACED:
        text = text.replace(mark, b" " + mark + b" ")
    for blank in BLANKS:
        text = text.replace(blank, b" ")
    return text


def _pattern(entry: str, version: int) -> bytes:
    before = "" if version == 2 and _stands_alone(entry[0]) else " "
    after = "" if version == 2 and _stands_alone(entry[-1]) else " "
    return _encoded(before + entry + after)


def _between_spaces(pattern: bytes) -> bool:
    return len(pattern) > 1 and pattern[:1] == b" " and pattern[-1:] == b" "


def _stands_alone(character: str) -> bool:
    point = ord(character)
    return character in PUNCTUATION or any(first <= point <= last for first, last in UNSPACED)


def _encoded(text: str) -> bytes:
    """UTF-8, in which a substring of bytes is a substring of characters; half surrogates, which crawls hold, too."""
    return text.encode("utf-8", "surrogatepass")


def entry_counts(pairs: Int64, n_entries: int) -> Int64:
    """How many captions contain each entry, int64[n_entries]; the sum over shards is the count over the pool."""
    return np.bincount(pairs[:, 1], minlength=n_entries).astype(np.int64)


def t_to_p(counts: npt.NDArray[Any], t: float) -> float:
    """The tail share p: the matches of entries with fewer than t, of all matches. NaN for a pool without matches."""
    counts = np.asarray(counts, dtype=np.int64)
    total = int(counts.sum())
    return int(counts[counts < t].sum()) / total if total else float("nan")


def p_to_t(counts: npt.NDArray[Any], p: float) -> int:
    """The threshold t for a tail share p: the count at which the cumulated share, over counts in ascending order, comes
    nearest to p (the smaller count of two). Raises PlanError for a pool without matches, or p outside 0..1.
    """
    ascending = np.sort(np.asarray(counts, dtype=np.int64))
    if not 0.0 <= p <= 1.0 or not len(ascending) or ascending[-1] <= 0:
        raise PlanError(f"metaclip: p is {p}, expected 0 to 1, over counts of which at least one is not 0")
    share = np.cumsum(ascending) / ascending.sum()
    return int(ascending[int(np.argmin(np.abs(share - p)))])


def keep_probabilities(counts: npt.NDArray[Any], t: float) -> Float64:
    """float64[n_entries]: t / max(count, t), the chance that one match of the entry keeps its caption."""
    if t <= 0:
        raise PlanError(f"metaclip: t is {t}; expected more than 0 matches an entry")
    return t / np.maximum(np.asarray(counts, dtype=np.float64), t)


def caption_probabilities(pairs: Int64, probabilities: Float64, n_captions: int) -> Float64:
    """float64[n_captions]: P(keep) = 1 - Π(1 - p) over a caption's entries; 0 for a caption without a match."""
    lost = np.ones(n_captions)
    np.multiply.at(lost, pairs[:, 0], 1.0 - probabilities[pairs[:, 1]])
    return 1.0 - lost


def kept(pairs: Int64, probabilities: Float64, keys: UInt64, seed: int) -> npt.NDArray[np.bool_]:
    """bool[n]: the captions that at least one of their entries draws.

    Each pair draws u < p on its own, with u from the hash of (seed, entry, key): keys uint64[n] are the first 64 bits
    of the samples' keys. The entry enters by its index, so the metadata list is part of the settings.
    """
    keep = np.zeros(len(keys), dtype=bool)
    drawn = _uniform(keys[pairs[:, 0]], pairs[:, 1], seed) < probabilities[pairs[:, 1]]
    keep[pairs[drawn, 0]] = True
    return keep


def _uniform(keys: UInt64, entries: Int64, seed: int) -> Float64:
    """[0, 1), 53 bits of a SplitMix64 hash (Steele et al. 2014) of seed, entry and key."""
    start = np.uint64((seed * 0x9E3779B97F4A7C15 + 0x5851F42D4C957F2D) % (1 << 64))
    hashes = _mixed(_mixed(keys + start) + entries.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03))
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(values: UInt64) -> UInt64:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""Building MetaCLIP's list of entries out of WordNet and Wikipedia counts (paper 2309.16671; RECIPES section 6).

Sources in this order: the numbers 0 to 99; WordNet synset names; unigrams with at least 100 occurrences; bigrams with a
pointwise mutual information of at least 30; article titles with at least 70 views. What an earlier source gave is not
given twice. It refuses to fetch or to count anything: the files come from the user (`index.noun` … of a WordNet
distribution; tab-separated counts and scores). How the paper computes the mutual information is not published.
"""

import math
import string
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from curate.errors import SourceError

LONGEST = 256  # characters, as in the second version of MetaCLIP


def wordnet_names(paths: Iterable[Path]) -> Iterator[str]:
    """The lemmas of WordNet `index.noun`, `index.verb`, … files, underscores as spaces; licence lines are skipped."""
    for path in paths:
        for line in _lines(path):
            if not line.startswith(" ") and line.strip():
                yield line.split(" ", 1)[0].replace("_", " ")


def scored(path: Path) -> dict[str, float]:
    """A file of lines name, tab, count or score; the largest of a name that comes twice. Raises SourceError with the
    line that is not one, and for a file without any."""
    scores: dict[str, float] = {}
    for number, line in enumerate(_lines(path), start=1):
        name, tab, score = line.rstrip("\n").rpartition("\t")
        try:
            held = float(score)
        except ValueError:
            held = math.nan
        if not tab or math.isnan(held):
            raise SourceError(f"{path}, line {number}: expected a name, a tab and a number")
        scores[name] = max(held, scores.get(name, held))
    if not scores:
        raise SourceError(f"{path}: it holds no line; expected names, each with a tab and a number")
    return scores


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, whatever mark of byte order it begins with. Raises SourceError."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is no text in UTF-8: {error}; convert it, or unpack it first") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}") from None


def at_least(scores: Mapping[str, float], least: float) -> Iterator[str]:
    """Names with at least so much (unigrams: 100; bigrams: 30; titles: 70), the largest first."""
    for name, score in sorted(scores.items(), key=lambda item: (-item[1], item[0])):
        if score >= least:
            yield name


def entries(*sources: Iterable[str]) -> list[str]:
    """0 to 99, then the sources in their order, each entry once; none empty, of punctuation alone, or of more than 256
    characters."""
    found: dict[str, None] = {}
    for source in (map(str, range(100)), *sources):
        for name in map(str.strip, source):
            if 0 < len(name) <= LONGEST and not all(character in string.punctuation for character in name):
                found.setdefault(name)
    return list(found)

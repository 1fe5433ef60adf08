"""`synset_words`: how many words of a caption name a WordNet synset of a list, as in DataComp's text-based filter.

A word is what stands between white space, punctuation included, in lower case; its synset is the first sense of the
first part of speech that knows it (noun, verb, adjective, adverb), by WordNet's own morphology (morphy: exception
lists, else one ending). NLTK 3.10 gives the same on 36,017 words; NLTK of 2023 tried further endings on words that no
ending fitted. DataComp keeps captions with a word whose synset is one of ImageNet-21k's (RECIPES section 11: paper
2304.14108; baselines/apply_filter.py l.237-295). As there, only the synset's offset is compared.

WordNet 3.0, whose offsets ImageNet's ids are, is the user's own: `wordnet` is the folder of index.noun, noun.exc and
their like (Debian's wordnet-base, or Princeton's WordNet-3.0.tar.gz), `synsets` a file of ids, a line `n01440764` each
(DataComp's imagenet21k_wordnet_ids.txt). It refuses to fetch either.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from curate.errors import WeightsError
from curate.score.scorer import Device, ScorerSettings, TextScorer, Values
from curate.score.weight_files import sha256_of

# Endings that morphy takes off or replaces, by part of speech, in the order in which WordNet looks (morphy(7WN)).
ENDINGS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "noun": (
        ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
        ("men", "man"), ("ies", "y"),
    ),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}  # fmt: skip
WORDS_KEPT = 1 << 18  # distinct words whose synset is remembered: 40 MB; captions repeat most of theirs


class WordNet:
    """First senses of words. 155,000 lemmas take 50 MB and a second."""

    def __init__(self, folder: Path) -> None:
        """Read `index.<part>` and `<part>.exc`. Raises WeightsError for a file that is missing or of another kind."""
        try:
            self._senses = {part: dict(_senses(folder / f"index.{part}")) for part in ENDINGS}
            self._exceptions = {part: dict(_exceptions(folder / f"{part}.exc")) for part in ENDINGS}
        except OSError as error:
            raise WeightsError(f"{folder}: no WordNet: {error}") from None
        except (ValueError, IndexError):
            raise WeightsError(f"{folder}: not WordNet's index files; expected WordNet 3.0's folder dict") from None

    def first_offset(self, word: str) -> int | None:
        """The offset of the first synset of a word in lower case; None for a word that WordNet does not know."""
        for part in ENDINGS:
            for form in self._base_forms(word, part):
                return self._senses[part][form]
        return None

    def _base_forms(self, word: str, part: str) -> Iterator[str]:
        """morphy: the word, then what the exception list says or, where it says nothing, the word by one ending."""
        forms = self._exceptions[part].get(word)
        if forms is None:
            forms = [word[: -len(old)] + new for old, new in ENDINGS[part] if word.endswith(old)]
        return (form for form in (word, *forms) if form in self._senses[part])


def _senses(path: Path) -> Iterator[tuple[str, int]]:
    """(lemma, offset of its first sense): lemma, part, synsets, p pointers, p symbols, senses, tagged, offsets …"""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith(" "):  # the licence
                fields = line.split()
                yield fields[0], int(fields[6 + int(fields[3])])


def _exceptions(path: Path) -> Iterator[tuple[str, list[str]]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            word, *forms = line.split()
            yield word, forms


class SynsetWordsSettings(ScorerSettings):
    """`wordnet`: folder of WordNet 3.0's index files; `synsets`: file of synset ids."""

    wordnet: str
    synsets: str


class SynsetWordsScorer(TextScorer):
    """See the module's docstring."""

    settings_type: ClassVar[type[ScorerSettings]] = SynsetWordsSettings

    def __init__(self, name: str, settings: SynsetWordsSettings) -> None:
        super().__init__(name, settings)
        self._folder = Path(settings.wordnet).expanduser().absolute()
        self._list = Path(settings.synsets).expanduser().absolute()
        self._listed: Any = None

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """int32: words of the caption whose first synset is listed."""
        return (pa.field("synset_words", pa.int32()),)

    def identity(self) -> Mapping[str, Any]:
        """Both by content."""
        files = [self._list, *(self._folder / name for part in ENDINGS for name in (f"index.{part}", f"{part}.exc"))]
        return {"files": {file.name: sha256_of(file) for file in files if file.is_file()}}

    def check(self) -> None:
        """Raises WeightsError when WordNet or the list is not there."""
        for key, path in (("wordnet", self._folder / "index.noun"), ("synsets", self._list)):
            if not path.is_file():
                raise WeightsError(f"score.{self.name}.{key}: no file {path}")

    def load(self, device: Device) -> None:
        """Read WordNet and the list."""
        wordnet, offsets = WordNet(self._folder), _offsets(self._list)

        @lru_cache(maxsize=WORDS_KEPT)
        def listed(word: str) -> bool:
            return wordnet.first_offset(word) in offsets

        self._listed = listed

    def score(self, texts: Sequence[str]) -> Mapping[str, Values]:
        """One count a text."""
        return {"synset_words": [sum(map(self._listed, text.lower().split())) for text in texts]}

    def unload(self) -> None:
        """Free WordNet."""
        self._listed = None


def _offsets(path: Path) -> frozenset[int]:
    """The offsets of a file of ids. Raises WeightsError."""
    lines = path.read_text("utf-8").split()
    try:
        return frozenset(int(line.lstrip("nvars")) for line in lines)
    except ValueError:
        raise WeightsError(f"{path}: expected a synset id such as n01440764 a line") from None

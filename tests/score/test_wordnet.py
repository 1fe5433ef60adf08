"""`synset_words` over a small WordNet in Princeton's own file layout."""

from pathlib import Path

import pytest

from curate.errors import WeightsError
from curate.score.registry import build
from curate.score.scorer import Device, TextScorer
from curate.score.wordnet import ENDINGS

# lemma, part, synsets, pointers and their symbols, senses, tagged senses, offsets; two licence lines first.
INDEX = {
    "noun": "  1 licence\n  2 licence\ndog n 2 3 @ ~ #m 2 1 02084071 10114209  \nman n 1 1 @ 1 1 10287213  \n"
    "run n 1 0 1 1 00558883  \naxis n 1 1 @ 1 0 05735047  \nfly n 1 1 @ 1 0 02190166  \n",
    "verb": "run v 1 2 @ ~ 1 1 01926311  \nbake v 1 1 @ 1 1 00319886  \n",
    "adj": "big a 1 1 & 1 1 01382086  \n",
    "adv": "well r 1 0 1 1 00011093  \n",
}
EXCEPTIONS = {"noun": "axes axis\n", "verb": "ran run\n", "adj": "bigger big\n", "adv": "best well\n"}


@pytest.fixture
def entry(tmp_path: Path) -> dict[str, str]:
    """Settings over the small WordNet, with dog, man, axis, fly and the verb run listed."""
    for part in ENDINGS:
        (tmp_path / f"index.{part}").write_text(INDEX[part])
        (tmp_path / f"{part}.exc").write_text(EXCEPTIONS[part])
    (tmp_path / "ids.txt").write_text("n02084071\nn10287213\nn05735047\nn02190166\nn01926311\n")
    return {"scorer": "synset_words", "wordnet": str(tmp_path), "synsets": str(tmp_path / "ids.txt")}


def test_words_that_name_a_listed_synset_are_counted(entry: dict[str, str]) -> None:
    """Guards against second senses, a verb's sense of a word that is a noun too, endings that are not taken off or
    not replaced, and punctuation that is cleaned away: DataComp's loop does none of these."""
    (scorer,) = build({"x": entry})
    assert isinstance(scorer, TextScorer)
    scorer.check()
    scorer.load(Device())
    texts = {
        "A dog": 1, "two DOGS and men": 2, "dog, sits": 0, "axes": 1, "flies fly": 2, "a run": 0, "she ran": 1,
        "baked well": 0, "bigger": 0, "": 0, " \n": 0,
    }  # fmt: skip
    assert dict(zip(texts, scorer.score(list(texts))["synset_words"], strict=True)) == texts


def test_what_is_missing_is_said_in_the_plan(entry: dict[str, str], tmp_path: Path) -> None:
    """Guards against a run that finds out on a worker that there is no WordNet, or a list of another kind."""
    for key in ("wordnet", "synsets"):
        (scorer,) = build({"x": {**entry, key: str(tmp_path / "none")}})
        with pytest.raises(WeightsError, match=f"score.x.{key}: no file"):
            scorer.check()
    (tmp_path / "ids.txt").write_text("dog\n")
    with pytest.raises(WeightsError, match="expected a synset id"):
        build({"x": entry})[0].load(Device())

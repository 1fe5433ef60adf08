"""MetaCLIP: matching against the published loop, restated; thresholds and draws against their definitions."""

import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.balance import metaclip, metadata
from curate.balance.metaclip import (
    Matcher,
    caption_probabilities,
    entry_counts,
    keep_probabilities,
    kept,
    matches,
    p_to_t,
    t_to_p,
)
from curate.errors import PlanError, SourceError


def padded(caption: str) -> str:
    """The published spacing, character by character."""
    out = "".join(f" {c} " if c in {",", ".", ";", ":", "?", "!", "`"} else c for c in " " + caption + " ")
    return "".join(" " if c in {"\t", "\n", "\r"} else c for c in out)


def loop(captions: list[str | None], entries: list[str]) -> list[tuple[int, int]]:
    """The published loop: every entry against every caption."""
    texts = [(i, padded(caption)) for i, caption in enumerate(captions) if caption]
    return [(i, j) for i, text in texts for j, entry in enumerate(entries) if " " + entry + " " in text]


def as_pairs(found: np.ndarray) -> list[tuple[int, int]]:
    return [(int(i), int(j)) for i, j in found]


TOKENS = [
    "a",
    "the",
    "Dog",
    "dog",
    "new",
    "york",
    "New",
    "York",
    "city",
    "猫",
    "東京",
    "日本 語",
    "ไทย",
    "don't",
    "é",
    "U.S.",
    "100",
]
GLUE = [" ", " ", " ", " ", "  ", ", ", ".", ";", ":", "?", "!", "`", "\t", "\n", "\r", "-", "/", "，", "", "\u00a0"]


def random_captions(count: int, seed: int) -> list[str | None]:
    rng = np.random.default_rng(seed)
    words, glue, length = (
        rng.integers(0, len(TOKENS), count * 8),
        rng.integers(0, len(GLUE), count * 8),
        rng.integers(0, 9, count),
    )
    captions: list[str | None] = []
    for i in range(count):
        steps = range(8 * i, 8 * i + length[i])
        captions.append("".join(TOKENS[words[j]] + GLUE[glue[j]] for j in steps) if i % 50 else None)
    return captions


ENTRIES = [
    *TOKENS, "new york", "New York", "york city", "new york city", "the dog", "dog the", ".", ",", "`", " ", "U . S",
    "a .", "dog dog", "dog  dog", "東京 猫", "-", "dog", "the  new", "", "\u00a0", "?", "100 100", "do", "猫，",
    "dog\u00a0the",
]  # fmt: skip


def test_matching_equals_the_loop_on_100_000_captions() -> None:
    """Guards the exact set: overlaps, punctuation, double and odd spaces, CJK, copies, empty entry, None and empty."""
    captions = random_captions(100_000, seed=0)
    assert None in captions and "" in captions
    found = matches(captions, ENTRIES)
    assert found.dtype == np.int64 and as_pairs(found) == loop(captions, ENTRIES)
    never = set(range(len(ENTRIES))) - set(found[:, 1].tolist())
    assert never == {ENTRIES.index("U.S."), ENTRIES.index("do")}  # a "." is always spaced; "do" is only inside "dog"


@given(
    st.lists(st.one_of(st.none(), st.text(st.sampled_from("ab ,.\n猫\ud800`"), max_size=12)), max_size=6),
    st.lists(st.text(st.sampled_from("ab ,猫\n"), max_size=4), max_size=8),
)
@settings(max_examples=400, deadline=None)
def test_matching_equals_the_loop_on_any_text(captions: list[str | None], entries: list[str]) -> None:
    """Guards the corners that nobody thinks of, half surrogates among them."""
    assert as_pairs(matches(captions, entries)) == loop(captions, entries)


def test_case_and_spaces_are_not_cleaned() -> None:
    """Guards against good intentions: the published match is case-sensitive and keeps double spaces."""
    assert as_pairs(matches(["New  York, NY"], ["new york", "New York", "New  York", "NY", "New"])) == [
        (0, 2),
        (0, 3),
        (0, 4),
    ]


def loop_version_2(captions: list[str | None], entries: list[str]) -> list[tuple[int, int]]:
    """The second version's loop for the characters that the test uses."""
    alone = set("猫東京日本語ไทยကខༀ.,!?-，。「」")

    def pattern(entry: str) -> str:
        return ("" if entry[0] in alone else " ") + entry + ("" if entry[-1] in alone else " ")

    texts = [(i, padded(caption)) for i, caption in enumerate(captions) if caption]
    return [(i, j) for i, text in texts for j, entry in enumerate(entries) if pattern(entry) in text]


def test_version_2_needs_no_spaces_in_scripts_without_them() -> None:
    """Guards the CJK rule: 東京 is found inside a run, "cat" only as a word, and か is not in the published ranges."""
    captions = [
        "東京タワー",
        "concat 猫",
        "cat",
        "「猫」と犬",
        "ไทยแลนด์",
        "a東京b",
        "か",
        "いか",
        "カ",
        *random_captions(2000, seed=1),
    ]
    entries = ["東京", "猫", "cat", "ไทย", "「猫」", "京", "か", "東京 cat", "dog，", "-", "cat 猫"]
    found = as_pairs(matches(captions, entries, version=2))
    assert found == loop_version_2(captions, entries)
    assert {(0, 0), (0, 5), (1, 1), (2, 2), (3, 4), (4, 3), (5, 0), (6, 6)} <= set(found)
    assert not {(1, 2), (7, 6)} & set(found)
    assert (0, 0) not in as_pairs(matches(captions, entries))


def test_refusals_name_the_entry() -> None:
    """Guards the plan: an empty entry has no first character for version 2's rule, and there is no version 3."""
    with pytest.raises(PlanError, match="entry 1 is empty"):
        Matcher(["a", ""], version=2)
    with pytest.raises(PlanError, match="expected 1 or 2"):
        Matcher(["a"], version=3)  # type: ignore[arg-type]


def test_nothing_gives_an_empty_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the shape [0, 2], and a matcher that is used for many batches and passes."""
    for captions, entries in (([], ["a"]), (["a"], []), ([None, ""], ["a", ""])):
        assert matches(captions, entries).shape == (0, 2)
    monkeypatch.setattr("curate.balance.metaclip.CAPTIONS_PER_PASS", 7)
    captions = random_captions(500, seed=2)
    assert as_pairs(Matcher(ENTRIES).matches(captions)) == loop(captions, ENTRIES)


def test_thresholds_and_tail_shares_are_inverse() -> None:
    """Guards t for another pool: the tail share is that of the counts below t, and p leads back to a t beside it."""
    counts = np.random.default_rng(0).zipf(1.3, 3000).clip(max=100_000)
    for t in (5, 100, 20_000):
        p = t_to_p(counts, t)
        assert p == pytest.approx(sum(c for c in counts.tolist() if c < t) / counts.sum())
        ascending = np.sort(counts)
        shares = np.cumsum(ascending) / counts.sum()
        again = p_to_t(counts, p)
        assert again == ascending[abs(shares - p).argmin()] and again <= t
    assert np.isnan(t_to_p(np.zeros(4, np.int64), 3))
    with pytest.raises(PlanError):
        p_to_t(np.zeros(4, np.int64), 0.5)
    with pytest.raises(PlanError):
        keep_probabilities(counts, 0)


def test_kept_share_is_the_published_probability() -> None:
    """Guards P(keep) = 1 - prod(1 - p): by pairs restated, and by the share of 200 seeds."""
    captions = random_captions(400, seed=3)
    pairs = matches(captions, ENTRIES)
    counts = entry_counts(pairs, len(ENTRIES))
    by_caption: dict[int, list[int]] = defaultdict(list)
    for caption, entry in as_pairs(pairs):
        by_caption[caption].append(entry)
    assert counts.tolist() == [sum(entry in found for found in by_caption.values()) for entry in range(len(ENTRIES))]
    chance = keep_probabilities(counts, 40)
    expected = [
        1 - np.prod([1 - min(1, 40 / counts[e]) for e in by_caption[i]]) if i in by_caption else 0 for i in range(400)
    ]
    probability = caption_probabilities(pairs, chance, 400)
    assert np.allclose(probability, expected)
    keys = np.random.default_rng(4).integers(0, 2**63, 400).astype(np.uint64)
    share = np.mean([kept(pairs, chance, keys, seed) for seed in range(200)], axis=0)
    assert abs(share - probability).max() < 0.15 and abs(share.mean() - probability.mean()) < 0.01
    assert (share[probability == 0] == 0).all() and (share[probability > 1 - 1e-12] == 1).all()


def test_draws_follow_the_key_not_the_shard() -> None:
    """Guards determinism: captions shuffled over shards keep their fate; equal texts with other keys have their own."""
    captions = random_captions(900, seed=5)
    keys = np.random.default_rng(6).integers(0, 2**63, 900).astype(np.uint64)
    pairs = matches(captions, ENTRIES)
    chance = keep_probabilities(entry_counts(pairs, len(ENTRIES)), 30)
    whole = kept(pairs, chance, keys, seed=1)
    order = np.random.default_rng(7).permutation(900)
    for part in np.array_split(order, 5):
        again = kept(matches([captions[i] for i in part], ENTRIES), chance, keys[part], seed=1)
        assert np.array_equal(again, whole[part])
    assert not np.array_equal(whole, kept(pairs, chance, keys, seed=2))
    same = matches(["dog the"] * 900, ENTRIES)
    fates = kept(same, np.full(len(ENTRIES), 0.2), keys, seed=1)
    assert 0.2 < fates.mean() < 0.7


def test_entries_come_from_wordnet_and_counts(tmp_path: Path) -> None:
    """Guards the list: licence lines, underscores, thresholds, order, copies, punctuation and broken lines."""
    index = tmp_path / "index.noun"
    index.write_text("  1 This software and database\nhot_dog n 1 0 1 0 07\ncat n 8 5 @ ~ 8 1 02\n", encoding="utf-8")
    unigrams = tmp_path / "unigrams.tsv"
    unigrams.write_text("cat\t500\nrare\t99\n!!\t4000\nzoo\t100\nthe\t900\n", encoding="utf-8")
    found = metadata.entries(
        metadata.wordnet_names([index]), metadata.at_least(metadata.scored(unigrams), 100), ["x" * 257, "  "]
    )
    assert found == [*map(str, range(100)), "hot dog", "cat", "the", "zoo"]
    unigrams.write_text("cat\t5\nno tab here\n", encoding="utf-8")
    with pytest.raises(SourceError, match="line 2"):
        metadata.scored(unigrams)


def test_every_pair_of_entries_may_overlap() -> None:
    """Guards overlapping patterns that share their space, the usual mistake of non-overlapping automata."""
    words = ["a", "b", "c"]
    entries = [" ".join(p) for n in (1, 2, 3) for p in itertools.product(words, repeat=n)]
    captions: list[str | None] = [" ".join(p) for p in itertools.product(words, repeat=5)]
    assert as_pairs(matches(captions, entries)) == loop(captions, entries)


def test_long_captions_are_matched_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against captions of a megabyte (pages pasted into alt texts), of which 2,000 in a batch made a text of
    more than 2 GB, which ended the run."""
    captions = ["a dog " * 40, None, "cat", "", *["dog, cat"] * 9, "a dog" * 50, "cat"]
    for version in (1, 2):
        whole = metaclip.Matcher(["dog", "cat", "a dog"], version).matches(captions)  # type: ignore[arg-type]
        monkeypatch.setattr(metaclip, "CHARACTERS_PER_PASS", 20)
        assert len(list(metaclip._passes(captions))) > 5
        parts = metaclip.Matcher(["dog", "cat", "a dog"], version).matches(captions)  # type: ignore[arg-type]
        assert np.array_equal(whole, parts) and len(whole)
        monkeypatch.undo()

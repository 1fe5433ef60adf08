"""Counts over the whole pool: rows with the same text or URL, and words that are rare."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from curate.errors import ConfigError
from curate.metrics import progress
from curate.schema import SAMPLE_FIELDS, Shard, TableSpec, keys_of
from curate.score import rare_words
from curate.score.pool_counts import pool_count_steps
from curate.store import Store

SAMPLES = TableSpec("samples", 1, pa.schema(SAMPLE_FIELDS), open_schema=True)
TEXTS = [
    ["a cat", "a  cat ", None, "dog"],
    ["a cat", "", "", "😀 x"],
    [None, None],
    ["dog\n", "One cat a", "a dog one"],
]
URLS = [[0, 1, 2, 3], [1, 1, 2, 4], [5, 6], [1, 2, 7]]


@pytest.fixture
def pool(tmp_path: Path) -> tuple[Store, list[Shard]]:
    """Four shards of samples, one of them without texts."""
    store, shards = Store(str(tmp_path)), []
    for number, (texts, names) in enumerate(zip(TEXTS, URLS, strict=True)):
        urls = [f"http://a/{name}" for name in names]
        shards.append(Shard(f"{number:04d}", len(texts)))
        store.write(SAMPLES, shards[-1], pa.table([keys_of(urls, texts), urls, texts], schema=pa.schema(SAMPLE_FIELDS)))
    return store, shards


def _scored(pool: tuple[Store, list[Shard]], entry: dict[str, object]) -> list[list[int | None]]:
    store, shards = pool
    (step,) = pool_count_steps({"copies": entry, "phash": {"scorer": "phash"}}, SAMPLES, shards)
    with progress("count", len(shards)) as ticker:
        step.run(store, shards, map, ticker)
    assert step.done(store, shards)
    assert store.names("_work/scores_copies") == []
    return [store.read(step.tables[0], shard.name).column(str(entry["scorer"])).to_pylist() for shard in shards]


def test_counts_meet_across_shards(pool: tuple[Store, list[Shard]]) -> None:
    """Guards against a count per shard, and against null texts that count as one text."""
    truth = Counter(" ".join(text.split()) for texts in TEXTS for text in texts if text is not None)
    assert _scored(pool, {"scorer": "text_count"}) == [
        [None if text is None else truth[" ".join(text.split())] for text in texts] for texts in TEXTS
    ]
    urls = Counter(name for names in URLS for name in names)
    assert _scored(pool, {"scorer": "url_count"}) == [[urls[name] for name in names] for names in URLS]


@pytest.mark.parametrize("commonest", [1, 2, 3, 5, 100])
def test_rare_words_are_counted_over_the_pool(
    pool: tuple[Store, list[Shard]], commonest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against words that are rare in a shard alone, pairs that are forgotten, and ties that are cut."""
    monkeypatch.setattr(rare_words, "ROWS_PER_PARTITION", 3)  # five partitions
    monkeypatch.setattr(rare_words, "SHARDS_PER_CHUNK", 2)
    told = []
    for text in (text for texts in TEXTS for text in texts):
        words = (text or "").lower().split()
        told.append(None if text is None else words + [" ".join(words[at : at + 2]) for at in range(len(words) - 1)])
    counts = Counter(word for words in told if words for word in words)
    least = sorted(counts.values(), reverse=True)[min(commonest, len(counts)) - 1]
    truth = [None if words is None else sum(counts[word] < least for word in words) for words in told]
    found = _scored(pool, {"scorer": "rare_words", "commonest": commonest})
    assert [number for numbers in found for number in numbers] == truth


def test_settings_are_refused() -> None:
    """Guards against a setting that is silently without effect."""
    with pytest.raises(ConfigError, match=r"score\.copies\.most"):
        pool_count_steps({"copies": {"scorer": "text_count", "most": 3}}, SAMPLES, [])
    with pytest.raises(ConfigError, match=r"score\.rare\.commonest"):
        pool_count_steps({"rare": {"scorer": "rare_words", "commonest": 0}}, SAMPLES, [])

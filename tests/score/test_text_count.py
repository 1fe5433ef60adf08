"""text_count: rows of the whole pool with the same text."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from curate.errors import ConfigError
from curate.metrics import progress
from curate.schema import SAMPLE_FIELDS, Shard, TableSpec, keys_of
from curate.score.text_count import text_count_steps
from curate.store import Store

SAMPLES = TableSpec("samples", 1, pa.schema(SAMPLE_FIELDS), open_schema=True)
TEXTS = [["a cat", "a  cat ", None, "dog"], ["a cat", "", "", "😀 x"], [None, None], ["dog\n", "one", "two"]]


def test_counts_meet_across_shards(tmp_path: Path) -> None:
    """Guards against a count per shard, and against null texts that count as one text."""
    store, shards = Store(str(tmp_path)), []
    for number, texts in enumerate(TEXTS):
        urls = [f"{number}/{row}" for row in range(len(texts))]
        shards.append(Shard(f"{number:04d}", len(texts)))
        store.write(SAMPLES, shards[-1], pa.table([keys_of(urls, texts), urls, texts], schema=pa.schema(SAMPLE_FIELDS)))
    (step,) = text_count_steps({"copies": {"scorer": "text_count"}, "phash": {"scorer": "phash"}}, SAMPLES, shards)
    with progress("count", len(shards)) as ticker:
        step.run(store, shards, map, ticker)
    truth = Counter(" ".join(text.split()) for texts in TEXTS for text in texts if text is not None)
    for shard, texts in zip(shards, TEXTS, strict=True):
        found = store.read(step.tables[0], shard.name).column("text_count").to_pylist()
        assert found == [None if text is None else truth[" ".join(text.split())] for text in texts]
    assert step.done(store, shards)
    assert store.names("_work/scores_copies") == []


def test_settings_are_refused() -> None:
    """Guards against a setting that is silently without effect."""
    with pytest.raises(ConfigError, match=r"score\.copies\.most"):
        text_count_steps({"copies": {"scorer": "text_count", "most": 3}}, SAMPLES, [])

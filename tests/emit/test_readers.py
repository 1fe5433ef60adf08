"""The field's own readers take a release as it is (the trainers themselves: tests/e2e/test_trainers.py)."""

from pathlib import Path

import pytest

from curate.emit.step import latest_release
from curate.store import Store
from tests.emit.pool import emitter, make_pool, recipe_with, run


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of pairs with captions (webdataset and datasets need members of one kind)."""
    root = tmp_path_factory.mktemp("release")
    store = Store(str(root))
    shards = make_pool(store)
    subsets = {"pairs": {"where": "text IS NOT NULL AND score > 0.1"}, "any": {}}
    run(emitter(store, shards, recipe_with(subsets, samples_per_shard=100, min_tars=4)), store, shards)
    return root / "releases" / str(latest_release(store))


def _size(release: Path, subset: str) -> int:
    return int((release / subset / "__len__").read_text())


def test_webdataset_reads_it(release: Path) -> None:
    """Guards against members that are not adjacent and keys that are not unique: webdataset would lose samples."""
    import webdataset

    tars = sorted(str(path) for path in (release / "any").glob("*.tar"))
    data = webdataset.WebDataset(f"{release}/any/{{00000..{len(tars) - 1:05d}}}.tar", shardshuffle=False).decode("pil")
    samples = list(data)
    assert len({sample["__key__"] for sample in samples}) == len(samples) == _size(release, "any")
    assert all(sample["jpg"].size == (24, 16) and sample["json"]["key"] == sample["__key__"] for sample in samples)


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_reads_it(release: Path, tmp_path: Path, streaming: bool) -> None:
    """Guards against samples that differ in their members, which `datasets` refuses."""
    import datasets

    data = datasets.load_dataset(
        "webdataset", data_files=str(release / "pairs" / "*.tar"), split="train", streaming=streaming,
        cache_dir=str(tmp_path),
    )  # fmt: skip
    samples = list(data)
    assert len(samples) == _size(release, "pairs")
    assert samples[0]["jpg"].size == (24, 16)
    assert all(sample["txt"].startswith("caption") for sample in samples)


def test_datasets_reads_the_folder_by_its_card(release: Path, tmp_path: Path) -> None:
    """Guards against a card whose front matter does not say where the subsets are."""
    import datasets

    data = datasets.load_dataset(str(release), "pairs", split="train", cache_dir=str(tmp_path))
    assert len(data) == _size(release, "pairs")


def test_datasets_takes_columns_that_begin_with_nulls(tmp_path: Path) -> None:
    """Guards against types guessed from five samples: the card says them, and a caption may be missing as well."""
    import datasets

    store = Store(str(tmp_path / "root"))
    shards = make_pool(store)
    run(
        emitter(store, shards, recipe_with({"any": {"where": "coalesce(score, 0) < 0.06"}}, image_names="own")),
        store,
        shards,
    )
    release = tmp_path / "root" / "releases" / str(latest_release(store))
    data = datasets.load_dataset(str(release), "any", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == _size(release, "any") > 10
    scores = [sample["json"]["score"] for sample in data]
    assert None in scores and any(score is not None for score in scores)
    assert None in [sample["txt"] for sample in data]
    assert all((sample["jpg"] or sample["png"]).size == (24, 16) for sample in data)


def test_duckdb_reads_the_manifest(release: Path) -> None:
    """Guards against a manifest that only we can read."""
    import duckdb

    query = f"SELECT subset, count(*), count(DISTINCT key) FROM '{release}/manifest.parquet' GROUP BY 1 ORDER BY 1"
    found = duckdb.sql(query).fetchall()
    assert found == [(name, _size(release, name), _size(release, name)) for name in ("any", "pairs")]

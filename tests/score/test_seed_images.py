"""Seed sets of images: folder, tars and `datasets` give the vectors that the pool's own scorer gives."""

import io
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from curate import image_sets
from curate.demo.paths import weights_dir
from curate.errors import PlanError
from curate.metrics import progress
from curate.score.chunk import Chunk
from curate.score.columns import vectors_of
from curate.score.registry import build
from curate.score.run import Runner, prepare
from curate.score.scorer import Device, ImageScorer
from curate.score.seed_images import SeedImagesStep, seed_images_step
from curate.store import Store
from curate.vectors import get_arrays
from tests.retrieve.pool import Killed, dying_map, shuffled_map
from tests.retrieve.test_step import _tree
from tests.score.tiny import encoded, picture

SECTION = {"clip": {"scorer": "clip", "model": f"local-dir:{weights_dir()}"}, "phash": {"scorer": "phash"}}
PICTURES = [encoded(picture(seed)) for seed in range(11)]


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """The pictures' vectors by the scorer itself."""
    scorer = build(SECTION)[0]
    assert isinstance(scorer, ImageScorer)
    scorer.load(Device())

    runner = Runner([scorer], [], Counter())
    prepared = [prepare([scorer], data, None) for data in PICTURES]
    columns = runner.run(Chunk(11, list(range(11)), texts=[None] * 11), prepared)
    return vectors_of(columns["clip_image"])[0]


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, str]:
    """The pictures three ways, with a file that is none and an image that is cut short."""
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for number, data in enumerate(PICTURES):
        (tmp_path / "folder" / ("deep" if number % 2 else ".") / f"{number:02d}.JPG").write_bytes(data)
    (tmp_path / "folder" / "99.png").write_bytes(PICTURES[0][:99])
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    for part in range(2):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as archive:
            for number, data in enumerate(PICTURES):
                if number % 2 == part:
                    for name, held in ((f"{number}.jpg", data), (f"{number}.json", b"{}")):
                        info = tarfile.TarInfo(name)
                        info.size = len(held)
                        archive.addfile(info, io.BytesIO(held))
    photos = [*({"bytes": data, "path": None} for data in PICTURES), None]
    features = datasets.Features({"label": datasets.Value("int32"), "photo": datasets.Image()})
    saved = datasets.Dataset.from_dict({"label": list(range(12)), "photo": photos}, features)
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "splits"))
    return {
        "files": str(tmp_path / "folder"),
        "tars": str(tmp_path / "*.tar"),
        "rows": f"datasets:{tmp_path / 'saved'}",
    }


def run(step: SeedImagesStep, store: Store, mapper: Any = shuffled_map) -> dict[str, int]:
    with progress("seeds", 1) as ticker:
        return dict(step.run(store, [], mapper, ticker))


def test_every_kind_of_set_has_the_scorers_vectors(
    tmp_path: Path, sets: dict[str, str], expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against seeds in another space than the pool's, images that get lost between pieces, and a bad one that
    ends the set."""
    monkeypatch.setattr(image_sets, "IMAGES_PER_PIECE", 4)
    store = Store(str(tmp_path / "root"))
    step = seed_images_step(sets, SECTION, "clip_image", store)
    assert not step.done(store, [])
    counts = run(step, store)
    assert step.done(store, [])
    assert counts == {"images of files": 12, "images of tars": 11, "images of rows": 12, "images without a vector": 2}
    order = {
        "files": [*range(0, 11, 2), *range(1, 11, 2)],
        "tars": [*range(0, 11, 2), *range(1, 11, 2)],
        "rows": [*range(11)],
    }
    for name, folder in step.folders.items():
        told = store.get_json(f"{folder}/rows.json")
        assert told["images"] == 11 + (name != "tars") and sum(told["rows"]) == 11
        parts = [get_arrays(store, f"{folder}/{number:08d}.npz")["vectors"] for number in range(len(told["rows"]))]
        assert [len(part) for part in parts] == told["rows"]
        found = np.concatenate(parts)
        assert found.dtype == np.float16 and np.allclose(found, expected[order[name]], atol=2e-3)


def test_what_is_embedded_once_is_named_by_images_and_scorer(tmp_path: Path, sets: dict[str, str]) -> None:
    """Guards against vectors of another model or of yesterday's folder, and against embedding a set again."""
    store = Store(str(tmp_path / "root"))
    one = {"files": sets["files"]}
    first = seed_images_step(one, SECTION, "clip_image", store)
    assert seed_images_step(one, SECTION, "clip_image", store).folders == first.folders
    renamed = {"other": SECTION["clip"]}
    assert seed_images_step(one, renamed, "other_image", store).folders != first.folders
    shutil.copy(Path(sets["files"]) / "00.JPG", Path(sets["files"]) / "11.jpg")
    assert seed_images_step(one, SECTION, "clip_image", store).folders != first.folders
    assert seed_images_step({}, SECTION, "anything", store).done(store, [])


def test_a_killed_run_embeds_the_rest(tmp_path: Path, sets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a million seeds embedded again because the machine of the last thousand was taken away."""
    monkeypatch.setattr(image_sets, "IMAGES_PER_PIECE", 4)
    embedded, run_batch = Counter[str](), Runner.run

    def counting(runner: Runner, chunk: Chunk, prepared: Any) -> Any:
        embedded["images"] += chunk.rows
        return run_batch(runner, chunk, prepared)

    monkeypatch.setattr(Runner, "run", counting)
    one = {"files": sets["files"]}
    trees = []
    for root, lives in (("whole", []), ("killed", [1, 1, 0])):
        store = Store(str(tmp_path / root))
        for survives in lives:
            with pytest.raises(Killed):
                run(seed_images_step(one, SECTION, "clip_image", store), store, dying_map(survives))
        step = seed_images_step(one, SECTION, "clip_image", store)
        counts = run(step, store)
        assert counts == {"images of files": 12, "images without a vector": 1}
        trees.append(_tree(tmp_path / root))
    assert trees[0] == trees[1]
    assert embedded["images"] == 2 * 12  # 12 of the whole run; of the killed ones the first piece once, and the rest


def test_wrong_sets_are_refused_in_the_plan(tmp_path: Path, sets: dict[str, str]) -> None:
    """Guards against a night of scoring before a folder turns out to be empty or the scorer to be none."""
    store = Store(str(tmp_path / "root"))
    (tmp_path / "empty").mkdir()
    for images, by, words in (
        (str(tmp_path / "empty"), "clip_image", "no images at"),
        (str(tmp_path / "none-*.tar"), "clip_image", "no images at"),
        (sets["files"], "phash", "no image scorer of this recipe writes phash"),
        ("datasets:owner/name:train", "clip_image", "NAME@COMMIT"),
        ("datasets:owner/name@main", "clip_image", "NAME@COMMIT"),
        ("datasets:", "clip_image", "NAME@COMMIT"),
    ):
        with pytest.raises(PlanError, match=words):
            seed_images_step({"x": images}, SECTION, by, store)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    for images, words in (
        (str(tmp_path / "bad"), "holds no image that can be embedded"),
        (str(tmp_path / "cut.tar"), "is no whole tar"),
        (f"datasets:{tmp_path / 'empty'}", "cannot be loaded"),
        (f"datasets:{tmp_path / 'splits'}", "train, test; write"),
        (f"datasets:{tmp_path / 'splits'}:val", "train, test; write"),
    ):
        step = seed_images_step({"x": images}, SECTION, "clip_image", store)
        with pytest.raises(PlanError, match=words):
            run(step, store)


def test_a_dataset_of_the_hub_is_known_by_its_commit(tmp_path: Path) -> None:
    """Guards against seeds that change on the hub under a fingerprint that does not."""
    store = Store(str(tmp_path))
    folders = [
        seed_images_step({"x": f"datasets:owner/name@{digit * 40}{split}"}, SECTION, "clip_image", store).folders["x"]
        for digit in "ab" for split in ("", ":train")
    ]  # fmt: skip
    assert len(set(folders)) == 4

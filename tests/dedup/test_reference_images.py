"""Evaluation sets that come as images: measured as the pool is, and found in it, by hash and by vector."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curate.config import DedupSettings
from curate.dedup.step import images_to_measure
from curate.demo.paths import weights_dir
from curate.errors import PlanError
from curate.metrics import progress
from curate.score.measured import measure, packed
from curate.score.reference_images import ReferenceImagesStep, reference_images_step
from curate.store import Store
from tests.dedup.pool import VectorPool
from tests.retrieve.pool import Killed, dying_map, shuffled_map
from tests.score.tiny import encoded, picture

SECTION = {"toy": {"scorer": "clip", "model": f"local-dir:{weights_dir()}"}, "phash": {"scorer": "phash"}}


def _pool(root: Path) -> VectorPool:
    """Eleven pictures in three shards."""
    images = [(str(seed), encoded(picture(seed))) for seed in range(11)]
    ((_, vectors),) = measure(packed(SECTION), "toy_image", images)
    ((_, hashes),) = measure(packed(SECTION), "image_phash", images)
    return VectorPool(root, np.array(vectors.to_pylist(), np.float16), 4, hashes=hashes.to_pylist())


def _evaluation(folder: Path) -> tuple[str, str]:
    """Pictures 3 and 7 encoded again at three quarters of the size, one of another kind, one cut short: a folder and a
    tar of them."""
    copies = {}
    for seed in (3, 7, 40):
        small = Image.open(io.BytesIO(encoded(picture(seed)))).convert("RGB")
        held = io.BytesIO()
        small.resize((small.width * 3 // 4, small.height * 3 // 4)).save(held, "JPEG", quality=85)
        copies[f"eval_{seed}.jpg"] = held.getvalue()
    copies["eval_cut.jpg"] = copies["eval_3.jpg"][:60]
    (folder / "val").mkdir()
    with tarfile.open(folder / "val.tar", "w") as archive:
        for name, data in copies.items():
            (folder / "val" / name).write_bytes(data)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(folder / "val"), str(folder / "val.tar")


def _rules(folder: str, tar: str) -> list[DedupSettings]:
    by_hash = {"name": "hashes", "images": folder, "radius": 6, "match": "direct"}
    by_vector = {"name": "vectors", "images": tar, "threshold": 0.97, "match": "direct"}
    return [
        DedupSettings.model_validate({"by": "image_phash", "within": False, "against": [by_hash]}),
        DedupSettings.model_validate({"by": "embedding_toy", "within": False, "against": [by_vector]}),
    ]


def _run(step: ReferenceImagesStep, store: Store, mapper: object = shuffled_map) -> dict[str, int]:
    with progress("references", 1) as ticker:
        return dict(step.run(store, [], mapper, ticker))  # type: ignore[arg-type]


def test_copies_of_evaluation_images_name_the_image(tmp_path: Path) -> None:
    """Guards against an evaluation image that stays in the pool because only files of hashes and vectors were read."""
    rules, pool = _rules(*_evaluation(tmp_path)), _pool(tmp_path / "pool")
    step = reference_images_step(images_to_measure(rules, pool.tables), SECTION)
    counts = _run(step, pool.store)
    assert counts == {
        "images of dedup.0.against.hashes": 4, "images of dedup.1.against.vectors": 4, "images that guard nothing": 2,
    }  # fmt: skip
    assert step.done(pool.store, [])
    for rule, name, start in ((rules[:1], "hashes", "val/"), (rules[1:], "vectors", "val.tar#")):
        folders = {place.replace("dedup.1", "dedup.0"): folder for place, folder in step.folders.items()}
        table, _ = pool.run(*rule, measured=folders)
        told = {number: row for number, row in enumerate(pool.rows(table)) if row["is_duplicate"]}
        assert {number: row["duplicate_of"].rpartition(start)[2] for number, row in told.items()} == {
            3: "eval_3.jpg", 7: "eval_7.jpg",
        }  # fmt: skip
        assert {row["duplicate_kind"] for row in told.values()} == {f"reference:{name}"}


def test_a_killed_run_measures_the_rest_and_another_set_is_another(tmp_path: Path) -> None:
    """Guards against values of half a set, and against those of yesterday's folder."""
    folder, tar = _evaluation(tmp_path)
    store = Store(str(tmp_path / "root"))
    asked = {"dedup.0.against.val": (folder, "image_phash"), "dedup.0.against.test": (tar, "image_phash")}
    step = reference_images_step(asked, SECTION)
    with pytest.raises(Killed):
        _run(step, store, dying_map(1))
    assert not step.done(store, [])
    _run(step, store)
    assert step.done(store, []) and reference_images_step(asked, SECTION).folders == step.folders
    (Path(folder) / "one_more.jpg").write_bytes(encoded(picture(1)))
    again = reference_images_step(asked, SECTION)
    assert [again.folders[place] == found for place, found in step.folders.items()] == [False, True]


def test_sets_that_cannot_be_measured_fail_in_the_plan(tmp_path: Path) -> None:
    """Guards against a wrong folder or a missing scorer that is found after the fetch."""
    folder, tar = _evaluation(tmp_path)
    rules, pool = _rules(folder, tar), _pool(tmp_path / "pool")
    with pytest.raises(PlanError, match=r"dedup\.0\.against\.hashes\.images: this pipeline measures"):
        pool.run(*rules)
    with pytest.raises(PlanError, match=r"dedup\.0\.against\.val\.images: no image scorer .* embedding_x"):
        reference_images_step({"dedup.0.against.val": (folder, "embedding_x")}, SECTION)
    (tmp_path / "none").mkdir()
    with pytest.raises(PlanError, match="no images at"):
        reference_images_step({"dedup.0.against.val": (str(tmp_path / "none"), "image_phash")}, SECTION)
    (tmp_path / "none" / "cut.jpg").write_bytes(b"\xff\xd8")
    step = reference_images_step({"dedup.0.against.val": (str(tmp_path / "none"), "image_phash")}, SECTION)
    with pytest.raises(PlanError, match="no image that can be measured"):
        _run(step, Store(str(tmp_path / "root")))
    both = {"name": "val", "images": folder, "hashes": str(tmp_path / "some.txt")}
    with pytest.raises(PlanError, match="`hashes` or `images`"):
        pool.run(DedupSettings.model_validate({"by": "image_phash", "against": [both]}))

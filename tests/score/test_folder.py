"""`curate score` on a folder: every file a row, with real scorers."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import imagehash
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.errors import PlanError, SourceError, WeightsError
from curate.score.folder import score_folder
from curate.score.phash import PhashScorer
from curate.score.registry import SCORERS
from curate.score.scorer import Values
from tests.score.tiny import encoded, picture, tiny_clip

SHARED = os.environ.get("CURATE_SHARED")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """75 images in two folders (more than a chunk), one broken, one empty, and files that are no images."""
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    for row in range(75):
        (root / ("deep" if row % 2 else "") / f"{row:03d}.png").write_bytes(encoded(picture(row), "PNG"))
    (root / "broken.jpg").write_bytes(encoded(picture(1))[:-40])
    (root / "empty.jpg").write_bytes(b"")
    (root / "notes.txt").write_text("not an image")
    return root


def test_one_row_a_file(folder: Path, tmp_path: Path) -> None:
    """Guards against a bad file ending the command, rows out of step with their files, and captions of other files."""
    captions = tmp_path / "captions.csv"
    captions.write_text("file,caption\n000.png,a first one\ndeep/001.png,two words\nnone.png,of no file\n")
    out = tmp_path / "out" / "scores.parquet"
    own = {"clip_tiny": {"scorer": "clip", "model": f"local-dir:{tiny_clip(tmp_path / 'clip')}"}}
    found = score_folder([folder], ["phash", "word_count", "clip_tiny"], captions, out, own)
    table = pq.read_table(out)
    assert table.column_names == ["path", "image_phash", "word_count", "clip_similarity_tiny", "status"]
    assert found.rows == table.num_rows == 77 and found.table is None
    assert found.statuses == {"ok": 75, "decode_error": 1, "not_image": 1}
    rows = {Path(row["path"]).name: row for row in table.to_pylist()}
    assert rows["broken.jpg"] == {**dict.fromkeys(table.column_names), **rows["broken.jpg"], "image_phash": None}
    for name in ("000.png", "001.png", "074.png"):
        with Image.open(next(folder.rglob(name))) as image:
            assert rows[name]["image_phash"] == str(imagehash.phash(image))
    assert [rows[name]["word_count"] for name in ("000.png", "001.png", "074.png")] == [3, 2, None]
    assert rows["001.png"]["clip_similarity_tiny"] is not None and rows["074.png"]["clip_similarity_tiny"] is None
    assert not any(reason.startswith("scores_status") for reason in found.reasons)


def test_csv_and_single_files(folder: Path, tmp_path: Path) -> None:
    """Guards against lists that CSV cannot hold, and against a named file being skipped for its suffix."""
    odd = tmp_path / "odd.bin"
    odd.write_bytes(encoded(picture(5)))
    own = {"clip_tiny": {"scorer": "clip", "model": f"local-dir:{tiny_clip(tmp_path / 'clip')}"}}
    out = tmp_path / "scores.csv"
    score_folder([odd, folder / "000.png"], ["clip_tiny_image", "image_phash"], out=out, entries=own)
    table = pc.read_csv(out)
    assert table.num_rows == 2 and table.column("clip_tiny_image")[0].as_py().startswith("[")
    returned = score_folder([odd], ["image_phash"]).table
    assert isinstance(returned, pa.Table) and returned.column("status").to_pylist() == ["ok"]


def test_mistakes_are_told_before_any_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a typo that shows after an hour."""
    monkeypatch.setenv("CURATE_WEIGHTS", "")
    monkeypatch.setenv("CURATE_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PlanError, match="--with num_facs: no scorer or column of that name; there are num_faces"):
        score_folder([folder], ["num_facs"])
    with pytest.raises(WeightsError, match="curate weights pull yunet-n-dynamic"):
        score_folder([folder], ["num_faces"])
    with pytest.raises(WeightsError, match="clip-vit-l14-openai"):
        score_folder([folder], ["aesthetic"])
    (tmp_path / "folder.parquet").mkdir()
    for wrong in ("scores.json", tmp_path / "folder.parquet"):
        with pytest.raises(PlanError, match=r"write to a file, \.parquet or \.csv"):
            score_folder([folder], ["phash"], out=wrong)
    with pytest.raises(PlanError, match="name at least one scorer"):
        score_folder([folder], [])
    with pytest.raises(PlanError, match="text_count: is counted over a whole pool"):
        score_folder([folder], ["text_count"])
    with pytest.raises(SourceError, match="no such file or folder"):
        score_folder([folder / "none"], ["phash"])
    with pytest.raises(SourceError, match="expected the columns file and caption, found path"):
        (tmp_path / "c.csv").write_text("path,other\na,b\n")
        score_folder([folder], ["phash"], captions=tmp_path / "c.csv")


def test_an_unfinished_file_replaces_none(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against half a table that looks whole after a scorer failed, and hidden remains beside it."""
    out = tmp_path / "out" / "scores.parquet"
    score_folder([folder / "000.png"], ["phash"], out=out)
    before = out.read_bytes()
    monkeypatch.setitem(SCORERS, "phash", Broken)
    with pytest.raises(ValueError, match="not one"):
        score_folder([folder], ["phash"], out=out)
    assert out.read_bytes() == before and list(out.parent.iterdir()) == [out]


class Broken(PhashScorer):
    """Fails on every picture."""

    def score(self, prepared: Sequence[str]) -> Mapping[str, Values]:
        raise ValueError("not one")


@pytest.mark.skipif(SHARED is None, reason="CURATE_SHARED is not set: no real images and weights here")
def test_real_images_with_text_and_faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a command that works on drawn PNGs alone: the issue's own example on real files."""
    monkeypatch.setenv("CURATE_WEIGHTS", str(Path(str(SHARED), "reference")))
    root = Path(str(SHARED), "realdata")
    with (root / "faces.csv").open() as stream:
        counted = list(csv.DictReader(stream))[:8]
    table = score_folder(
        [root / row["path"] for row in counted], ["text_density", "num_faces"], root / "captions.csv"
    ).table
    assert table is not None and set(table.column("status").to_pylist()) == {"ok"}
    assert table.column_names == ["path", "text_area", "text_boxes", "text_density", "num_faces", "status"]

"""What a careless or hostile user gives to scorers: files that are not what they say, pictures of other depths."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curate.errors import ConfigError, CurateError, PlanError, SourceError, WeightsError
from curate.score.decode import Picture, decode
from curate.score.folder import score_folder
from tests.score.onnx_bytes import node, write_onnx
from tests.score.tiny import encoded, picture, tiny_clip


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for row in range(4):
        (tmp_path / "images" / f"{row:03d}.png").write_bytes(encoded(picture(row), "PNG"))
    return tmp_path / "images"


def scored(folder: Path, name: str, **own: dict[str, Any]) -> list[dict[str, Any]]:
    table = score_folder([folder], [name], entries=own).table
    assert table is not None
    return [dict(row) for row in table.to_pylist()]


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_clip_files_that_hold_no_tensors(folder: Path, tmp_path: Path, name: str) -> None:
    """Guards against a pickle that runs, and against torch's traceback, which advises to let it run."""
    model = tiny_clip(tmp_path / "clip")
    (model / "open_clip_model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran"), 2))
    with pytest.raises(WeightsError, match="no tensors of this model"):
        scored(folder, "c", c={"scorer": "clip", "model": f"local-dir:{model}"})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["[]", '{"model_cfg": []}', '{"model_cfg": {}}', '{"model_cfg": {"embed_dim": "x"}}'])
def test_clip_configurations_that_are_none(folder: Path, tmp_path: Path, text: str) -> None:
    """Guards against a traceback that names neither the file nor the entry."""
    model = tiny_clip(tmp_path / "clip")
    (model / "open_clip_config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"score\.c\.model: .* is not an open_clip configuration"):
        scored(folder, "c", c={"scorer": "clip", "model": f"local-dir:{model}"})


def test_a_models_own_code_is_never_offered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a terminal where one `y` runs Python that came with a model."""
    maps = {"AutoConfig": "own.C", "AutoModelForImageClassification": "own.M", "AutoImageProcessor": "own.P"}
    config = {"model_type": "unheard_of", "id2label": {"0": "a", "1": "b"}, "auto_map": maps}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"auto_map": maps}))
    (tmp_path / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(WeightsError, match="Python of its own, which is never run"):
        scored(folder, "h", h={"scorer": "hf_classifier", "model": str(tmp_path)})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"id2label": {"x": "a"}}', '{"id2label": ["a"]}'])
@pytest.mark.parametrize("kind", ["hf_classifier", "hf_embed"])
def test_configurations_of_transformers_that_are_none(folder: Path, tmp_path: Path, text: str, kind: str) -> None:
    """Guards against a traceback in the plan, before any word on which entry is wrong."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CurateError, match=r"score\.h\.model"):
        scored(folder, "h", h={"scorer": kind, "model": str(tmp_path)})


def mean_network(path: Path, *after: bytes, out: str = "m", **weights: np.ndarray) -> str:
    """The mean of each colour, and what comes after it."""
    first = node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0)
    return str(write_onnx(path, [first, *after], {"x": ["N", 3, 8, 8]}, {out: ["N", "k"]}, weights))


def test_a_network_that_answers_crosswise(folder: Path, tmp_path: Path) -> None:
    """Guards against [labels, N] reshaped to [N, labels]: finite numbers, of other pictures."""
    file = mean_network(tmp_path / "t.onnx", node("Transpose", ["m"], ["y"], perm=[1, 0]), out="y")
    entry = {"scorer": "onnx_classifier", "weights": file, "labels": ["a", "b", "c"], "side": 8}
    with pytest.raises(ConfigError, match=r"gives \[3, 4\] for 4 pictures"):
        scored(folder, "o", o=entry)


def test_large_outputs_are_unit_vectors(folder: Path, tmp_path: Path) -> None:
    """Guards against a norm that overflows, after which every picture had the vector of zeros."""
    scale = np.array([[1e30]], np.float32)
    file = mean_network(tmp_path / "l.onnx", node("Mul", ["m", "k"], ["y"]), out="y", k=scale)
    rows = scored(folder, "o", o={"scorer": "onnx_embed", "weights": file, "width": 3, "side": 8})
    assert [np.linalg.norm(row["o_image"]) for row in rows] == pytest.approx([1] * 4, abs=1e-3)


def test_networks_that_do_not_fit_their_entry(folder: Path, tmp_path: Path) -> None:
    """Guards against ONNX Runtime's traceback after the first pictures were decoded."""
    entry = {"scorer": "onnx_embed", "weights": mean_network(tmp_path / "m.onnx"), "width": 3, "side": 8}
    for wrong, said in (({"side": 9}, "expected one input of pictures, 9 x 9"), ({"output": "zz"}, "no output 'zz'")):
        with pytest.raises(WeightsError, match=said):
            scored(folder, "o", o={**entry, **wrong})
    with pytest.raises(ConfigError, match=r"score\.o\.std"):
        scored(folder, "o", o={**entry, "std": [0, 1, 1]})
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 100)
    timm = {"scorer": "timm_embed", "weights": str(tmp_path / "junk.safetensors"), "width": 3}
    with pytest.raises(ConfigError, match="timm has no such model"):
        scored(folder, "t", t={**timm, "model": "resnetzzz"})
    with pytest.raises(WeightsError, match="not a file of tensors"):
        scored(folder, "t", t={**timm, "model": "resnet10t"})


@pytest.mark.parametrize("kind", ["png16", "float", "nan"])
def test_deep_pictures_are_what_fetch_stores(kind: str) -> None:
    """Guards against a photograph of 16 bits or floats that is scored as a white, or a black, sheet."""
    grey = np.asarray(picture(3).convert("L"))
    image = (
        Image.fromarray(grey.astype(np.uint16) * 257) if kind == "png16" else Image.fromarray(grey / np.float32(255))
    )
    if kind == "nan":
        image.putpixel((2, 3), float("nan"))
    data = encoded(image, "PNG" if kind == "png16" else "TIFF")
    found = decode(data)
    assert isinstance(found, Picture)
    wanted = grey.copy()
    if kind == "nan":
        wanted[3, 2] = 0
    assert np.array_equal(found.pixels, np.repeat(wanted[:, :, None], 3, axis=2))


def test_odd_names_and_files(folder: Path, tmp_path: Path) -> None:
    """Guards against one name that is not UTF-8 losing every row, and a pipe that is waited for without end."""
    odd = os.fsencode(folder / "000.png").replace(b"000", b"\xff")
    Path(os.fsdecode(odd)).write_bytes(encoded(picture(9), "PNG"))
    table = score_folder([folder], ["phash"]).table
    assert table is not None and table.column("status").to_pylist() == ["ok"] * 5
    assert any(name.endswith("\\udcff.png") for name in table.column("path").to_pylist())
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(SourceError, match="neither a plain file nor a folder"):
        score_folder([tmp_path / "pipe.jpg"], ["phash"])


def test_captions_stay_as_they_were_written(folder: Path, tmp_path: Path) -> None:
    """Guards against 007 read as 7, `NA` as no caption, and names such as 001 that match no file."""
    for number, text in enumerate(["007", "NA", "1e5"]):
        file = tmp_path / f"{number}.csv"
        file.write_text(f"file,caption\n000.png,{text}\n")
        table = score_folder([folder], ["text_length"], file).table
        assert table is not None and table.column("text_length").to_pylist() == [len(text), None, None, None]


def test_captions_that_are_no_text(folder: Path, tmp_path: Path) -> None:
    """Guards against a traceback for a wrong file of captions."""
    (tmp_path / "latin.csv").write_bytes(b"file,caption\n000.png,\xff\xfe\n")
    (tmp_path / "twice.csv").write_text("file,caption,caption\n000.png,x,y\n")
    pq.write_table(pa.table({"file": ["000.png"], "caption": [["x"]]}), tmp_path / "list.parquet")
    for name in ("latin.csv", "twice.csv", "list.parquet"):
        with pytest.raises(SourceError, match=name):
            score_folder([folder], ["text_length"], tmp_path / name)


def test_the_tables_own_columns(folder: Path, tmp_path: Path) -> None:
    """Guards against a scorer whose column replaces the path or the status of each row."""
    clip = {"scorer": "clip", "model": f"local-dir:{tiny_clip(tmp_path / 'clip')}", "column": "status"}
    with pytest.raises(PlanError, match="column status"):
        score_folder([folder], ["c"], entries={"c": clip})


def test_a_head_of_another_width(folder: Path, tmp_path: Path) -> None:
    """Guards against a shape error that does not say which entry to mend."""
    clip = {"scorer": "clip", "model": f"local-dir:{tiny_clip(tmp_path / 'clip')}"}
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "v1.pth")
    head = {"scorer": "laion_aesthetic_v1", "features": "c", "weights": str(tmp_path / "v1.pth")}
    with pytest.raises(ConfigError, match=r"score\.h\.features: c does not fit the head"):
        score_folder([folder], ["h"], entries={"c": clip, "h": head})

"""A release in the forms of others, read back by their rules."""

import hashlib
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mmap import ACCESS_READ, mmap
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.emit.exports import COYO, EXPORTS
from curate.emit.hub import push_to_hub
from curate.emit.step import latest_release
from curate.errors import MissingTable, PlanError
from curate.store import Store
from tests.emit.pool import emitter, make_pool, recipe_with, run


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release with two subsets of several tars."""
    root = tmp_path_factory.mktemp("release")
    store = Store(str(root))
    shards = make_pool(store)
    subsets = {"good": {"where": "score > 0.5"}, "any": {}, "none": {"where": "score > 5"}}
    run(emitter(store, shards, recipe_with(subsets, samples_per_shard=40)), store, shards)
    return root / "releases" / str(latest_release(store))


def _keys(release: Path, subset: str) -> list[str]:
    return [row["key"] for row in pq.read_table(release / "manifest.parquet").to_pylist() if row["subset"] == subset]


def test_coyo_and_laion_tables(release: Path, tmp_path: Path) -> None:
    """Guards against columns under other names, and rows of another subset."""
    coyo = pq.read_table(EXPORTS["coyo"](str(release), "good", tmp_path / "coyo"))
    assert coyo.schema.names == COYO.names and len(COYO.names) == 17
    assert coyo.num_rows == len(_keys(release, "good"))
    assert coyo.column("id").null_count == 0 and len(set(coyo.column("id").to_pylist())) == coyo.num_rows
    assert set(coyo.column("width").to_pylist()) == {24}
    laion = pq.read_table(EXPORTS["laion"](str(release), "good", tmp_path / "laion"))
    assert set(laion.column("LICENSE").to_pylist()) == {"?"}
    assert laion.column("URL").to_pylist() == coyo.column("url").to_pylist()


def test_datacomp_uids(release: Path, tmp_path: Path) -> None:
    """Guards against ids that DataComp's resharder cannot search: it needs them sorted, two u8 each."""
    ids = np.load(EXPORTS["datacomp"](str(release), "any", tmp_path))
    assert ids.dtype == np.dtype("u8,u8")
    assert [f"{high:016x}{low:016x}" for high, low in ids.tolist()] == sorted(_keys(release, "any"))
    assert len(np.load(EXPORTS["datacomp"](str(release), "none", tmp_path))) == 0


def test_url_list_holds_neither_image_nor_caption(release: Path, tmp_path: Path) -> None:
    """Guards against captions handed on where only links may be."""
    table = pq.read_table(EXPORTS["urls"](str(release), "good", tmp_path))
    assert {"uid", "url", "sha256", "score"} <= set(table.schema.names)
    scores = ["score", "word_count", "boxes"]
    sizes = ["width", "height", "original_width", "original_height", "original_bytes", "source_width"]
    assert sorted(table.schema.names) == sorted(["uid", "url", "sha256", *sizes, *scores])
    assert table.column("uid").to_pylist() == _keys(release, "good")


def test_dinov2_reads_our_tars(release: Path, tmp_path: Path) -> None:
    """Guards against offsets that DINOv2's ImageNet22k would cut wrongly: it drops 512 bytes of header."""
    entries = np.load(EXPORTS["entries"](str(release), "any", tmp_path), mmap_mode="r")
    classes = np.load(tmp_path / "class-ids.npy", mmap_mode="r")
    assert len(entries) == len(_keys(release, "any"))
    for entry in entries[::17]:
        assert str(classes[entry["class_index"]]) == str(entry["class_id"])
        with (release / "any" / f"{entry['class_id']}.tar").open() as file:
            mapped = mmap(fileno=file.fileno(), length=0, access=ACCESS_READ)
        data = mapped[entry["start_offset"] : entry["end_offset"]][512:]
        assert Image.open(io.BytesIO(data)).convert("RGB").size == (24, 16)


def test_unknown_subset_is_named(release: Path, tmp_path: Path) -> None:
    """Guards against an empty export of a misspelt subset, in the place of a good one."""
    good = EXPORTS["coyo"](str(release), "good", tmp_path).read_bytes()
    with pytest.raises(PlanError, match="no subset godo"):
        EXPORTS["coyo"](str(release), "godo", tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [good]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_map_style_dataset_with_four_workers(release: Path) -> None:
    """Guards against handles shared between processes, labels that are asked for, and samples in another order."""
    from torch.utils.data import DataLoader

    from curate.torch import ReleaseDataset

    data = ReleaseDataset(str(release), "any", transform=lambda image: image.resize((8, 8)).tobytes())
    assert len(data) == len(_keys(release, "any"))
    alone = [data[index][0] for index in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=4)
    assert [item[0] for item in loader] == alone
    assert data[0][1] == () and data.failures == 0
    assert data[-1][0] == alone[-1]
    with pytest.raises(MissingTable, match="no subset godo"):
        ReleaseDataset(str(release), "godo")


def test_bad_picture_does_not_end_a_run(tmp_path: Path) -> None:
    """Guards against one undecodable image that kills training after days, and against losing it silently."""
    from torch.utils.data import DataLoader

    from curate.torch import ReleaseDataset

    store = Store(str(tmp_path))
    shards = make_pool(store, shards=2, rows=20)
    run(emitter(store, shards, recipe_with({"any": {}})), store, shards)
    name = str(latest_release(store))
    row = pq.read_table(tmp_path / "releases" / name / "manifest.parquet").to_pylist()[3]
    with (tmp_path / "releases" / name / "any" / row["tar"]).open("r+b") as file:
        file.seek(row["offset"])
        file.write(b"\0" * row["length"])
    data = ReleaseDataset(str(tmp_path / "releases" / name), "any", transform=lambda image: image.tobytes())
    items = [item[0] for item in DataLoader(data, batch_size=None, num_workers=2)]
    assert len(items) == len(data) and items[3] == items[4]
    assert data.failures == 1


def test_croissant_names_files_and_columns_that_are_there(release: Path, tmp_path: Path) -> None:
    """Guards against metadata of other files than those that lie there, and references to nothing."""
    tree = json.loads(EXPORTS["croissant"](str(release), "good", tmp_path).read_text())
    assert tree["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    assert "containedIn" not in tree["@context"]  # else mlcroissant finds no picture: the term is schema.org's
    files = {entry["@id"]: entry for entry in tree["distribution"]}
    for name, entry in files.items():
        if entry["@type"] == "cr:FileObject":
            assert hashlib.sha256((release / name).read_bytes()).hexdigest() == entry["sha256"]
    fields = [field for records in tree["recordSet"] for field in records["field"]]
    columns = pq.read_schema(release / "manifest.parquet").names
    for field in fields:
        source = field["source"]
        assert source.get("fileObject", source.get("fileSet"))["@id"] in files
        assert source["extract"].get("column", "key") in columns
    assert {"samples/score", "samples/key", "pictures/image"} <= {field["@id"] for field in fields}


def test_datasets_folder_loads_and_is_uploaded(release: Path, tmp_path: Path) -> None:
    """Guards against a folder that `datasets` cannot load, an upload that leaves files out, and tars of an earlier
    release that stay in it, with samples that were taken back since.
    """
    import datasets

    (tmp_path / "out" / "good").mkdir(parents=True)
    (tmp_path / "out" / "good" / "00077.tar").write_bytes(b"of an earlier release")
    folder = EXPORTS["datasets"](str(release), "good", tmp_path / "out")
    data = datasets.load_dataset(str(folder), split="train", streaming=True)
    assert sorted(row["__key__"] for row in data) == sorted(_keys(release, "good"))
    with _Hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_toy")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the Hub is on this machine
        push_to_hub(folder, "someone/pictures", endpoint=hub.url)
    sent = {path for path in hub.committed if not path.startswith(".git")}
    assert sent == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(PlanError, match="is empty"):
        EXPORTS["datasets"](str(release), "none", tmp_path / "none")


class _Hub:
    """Answers as the Hub does to a repository made and a commit of files sent inline."""

    def __init__(self) -> None:
        self.committed: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer: dict[str, Any] = {}
                if self.path.endswith("/repos/create"):
                    answer = {"url": f"{hub.url}/datasets/someone/pictures"}
                elif "/preupload/" in self.path:
                    files = json.loads(body)["files"]
                    answer = {"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]}
                elif "/commit/" in self.path:
                    lines = [json.loads(line) for line in body.splitlines()]
                    hub.committed |= {line["value"]["path"] for line in lines if line["key"] == "file"}
                    answer = {"commitUrl": f"{hub.url}/datasets/someone/pictures/commit/1", "commitOid": "1"}
                self._say(answer)

            def do_GET(self) -> None:
                self._say({"siblings": [], "sha": "1", "id": "someone/pictures"})

            def _say(self, answer: dict[str, Any]) -> None:
                data = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "_Hub":
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

"""Sets of images that join a crawl as they are: packed by the command, adopted, released."""

import io
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from curate.balance.entries import read_entries
from curate.cli import app
from curate.config import parse_recipe
from curate.engine.job import Job
from curate.errors import PlanError
from curate.ingest.pack import pack
from curate.metrics import progress
from curate.rows import columns_of, read_rows
from pipelines import image_text
from tests.ingest.pool import tree


def _image(seed: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50 + seed, 3), np.uint8)).save(out, kind)
    return out.getvalue()


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, list[bytes]]:
    """A folder, tars and a dataset; one file of the folder is no image."""
    held = {name: [_image(at + 10 * place, kind) for at in range(5)]
            for place, (name, kind) in enumerate((("folder", "PNG"), ("tars", "JPEG"), ("saved", "WEBP")))}  # fmt: skip
    (tmp_path / "folder/deep").mkdir(parents=True)
    for number, data in enumerate(held["folder"]):
        (tmp_path / "folder" / ("deep" if number % 2 else ".") / f"{number}.png").write_bytes(data)
    (tmp_path / "folder/z.jpg").write_bytes(b"no image")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, data in enumerate(held["tars"]):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    images = [{"path": None, "bytes": data} for data in held["saved"]]
    saved = datasets.Dataset.from_dict({"picture": images}, features=datasets.Features({"picture": datasets.Image()}))
    saved.save_to_disk(tmp_path / "saved")
    return held


def _pack(images: str, name: str, out: Path, **options: Any) -> tuple[int, int]:
    with progress("pack", 1) as ticker:
        return pack(images, name, str(out), ticker, **options)


class Web:
    """A loopback server that counts what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[str] = Counter()
        web = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked[self.path] += 1
                super().do_GET()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    """Four pictures of a crawl, and a table of their URLs; one row claims to lie in somebody's tar."""
    (tmp_path / "web").mkdir()
    for number in range(4):
        (tmp_path / f"web/{number}.jpg").write_bytes(_image(100 + number))
    web = Web(tmp_path / "web")
    thread = Thread(target=web.server.serve_forever)
    thread.start()
    urls = [f"{web.url}/{number}.jpg" for number in range(4)]
    pq.write_table(
        pa.table({"url": urls, "text": ["a"] * 4, "pool_tar": [str(tmp_path / "a.tar")] * 4, "pool_key": ["0"] * 4}),
        tmp_path / "urls.parquet",
    )
    yield web
    web.server.shutdown()
    thread.join()
    web.server.server_close()


def _run(tmp_path: Path, root: str, *adopt: str) -> Job:
    recipe = {
        "root": str(tmp_path / root), "engine": {"driver": "inline"},
        "ingest": {"sources": [str(tmp_path / "urls.parquet")], "adopt": [str(tmp_path / name) for name in adopt]},
        "fetch": {"allow_networks": ["127.0.0.1/32"], "image_size": 32, "retries": 0},
        "subsets": {"all": {"where": "TRUE"}},
    }  # fmt: skip
    if not adopt:
        del recipe["ingest"]["adopt"]  # type: ignore[attr-defined]
    job = Job(parse_recipe(recipe))
    image_text.run(job)
    job.close()
    return job


def _rows(job: Job, *names: str) -> list[dict[str, Any]]:
    columns = columns_of([job.tables["samples"], job.tables["images"]])
    return [row for shard in job.shards for row in read_rows(job.store, columns, names, shard.name).to_pylist()]


def test_sets_join_a_crawl_as_they_are(tmp_path: Path, sets: dict[str, list[bytes]], web: Web) -> None:
    """Guards "as is" members from outside of the crawl: released byte for byte beside it, whatever they came as; the
    crawl is not fetched again for them, and no row of a crawl reads a tar by naming one."""
    before = _run(tmp_path, "run")
    assert [row["status"] for row in _rows(before, "status")] == ["ok"] * 4
    for name, images in (("folder", "folder"), ("tars", "a.tar"), ("saved", "datasets:{}/saved")):
        given = images.format(tmp_path) if "{}" in images else str(tmp_path / images)
        assert _pack(given, name, tmp_path / "packed" / name, per_tar=3) == (
            6 if name == "folder" else 5,
            name == "folder",
        )
    asked = web.asked.total()
    job = _run(tmp_path, "run", "packed/folder/*.tar", "packed/tars", "packed/saved")
    assert web.asked.total() == asked
    assert job.tables["images"].fingerprint == before.tables["images"].fingerprint
    rows = _rows(job, "key", "dataset", "status", "width", "url", "tar", "offset", "length")
    assert Counter((row["dataset"], row["status"]) for row in rows) == {
        (None, "ok"): 4, ("folder", "ok"): 5, ("folder", "not_image"): 1, ("tars", "ok"): 5, ("saved", "ok"): 5,
    }  # fmt: skip
    table = pa.Table.from_pylist([row for row in rows if row["status"] == "ok"])
    data = dict(zip(table["key"].to_pylist(), job.store.read_images(table), strict=True))
    for name, held in sets.items():
        assert sorted(data[row["key"]] for row in rows if row["dataset"] == name and row["status"] == "ok") == sorted(
            held
        )
    assert {row["width"] for row in rows if row["dataset"] is None} == {32}
    newest = Path(job.store.root, "releases", job.store.names("releases")[1])
    members: list[str] = []
    for path in newest.glob("all/*.tar"):
        with tarfile.open(path) as archive:
            members += archive.getnames()
    assert sum(not name.endswith((".json", ".txt")) for name in members) == 19


def test_a_killed_pack_goes_on(tmp_path: Path, sets: dict[str, list[bytes]]) -> None:
    """Guards against other tars after a kill, and against two sets in one folder."""
    _pack(str(tmp_path / "folder"), "a", tmp_path / "whole", per_tar=2)
    _pack(str(tmp_path / "folder"), "a", tmp_path / "cut", per_tar=2)
    for name in ("00001.parquet", "00002.parquet", "00002.tar"):
        (tmp_path / "cut" / name).unlink()
    _pack(str(tmp_path / "folder"), "a", tmp_path / "cut", per_tar=2)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    with pytest.raises(PlanError, match="choose another --out"):
        _pack(str(tmp_path / "a.tar"), "b", tmp_path / "cut", per_tar=2)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.jpg").write_bytes(b"")
    with pytest.raises(PlanError, match="no image that can be opened"):
        _pack(str(tmp_path / "bad"), "b", tmp_path / "none")
    shutil.rmtree(tmp_path / "bad")
    with pytest.raises(PlanError, match="no images at"):
        _pack(str(tmp_path / "bad"), "b", tmp_path / "none")


def _tar(path: Path, *members: tuple[str, bytes | str]) -> None:
    """A tar of files by their bytes, and of hard links by what they point to."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE, content
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content if isinstance(content, bytes) else b""))


def test_nothing_is_written_over(tmp_path: Path, sets: dict[str, list[bytes]]) -> None:
    """Guards a person's own tars: `00000.tar` of the set itself or of another pool was replaced by ours, without a
    word, when it lay where --out pointed."""
    own = tmp_path / "own"
    own.mkdir()
    _tar(own / "00000.tar", *((f"{number}.jpg", data) for number, data in enumerate(sets["tars"])))
    before = tree(own)
    for images in (str(own / "*.tar"), str(tmp_path / "folder")):
        with pytest.raises(PlanError, match="choose another --out"):
            _pack(images, "x", own, per_tar=2)
    assert tree(own) == before


@pytest.mark.parametrize("change", ["name", "bytes", "fewer", "table"])
def test_another_set_under_the_same_files_is_refused(tmp_path: Path, sets: dict[str, list[bytes]], change: str) -> None:
    """Guards against a second run that says it packed what it did not: another --name, other bytes under the same file
    names, tars of images that are gone, a table that is none."""
    _pack(str(tmp_path / "folder"), "x", tmp_path / "out", per_tar=2)
    if change == "bytes":
        (tmp_path / "folder/0.png").write_bytes(_image(77, "PNG"))
    elif change == "fewer":
        for name in ("deep/1.png", "deep/3.png"):
            (tmp_path / "folder" / name).unlink()
    elif change == "table":
        (tmp_path / "out/00001.parquet").write_bytes(b"garbage")
    with pytest.raises(PlanError, match="choose another --out"):
        _pack(str(tmp_path / "folder"), "y" if change == "name" else "x", tmp_path / "out", per_tar=2)


def test_tars_cut_from_the_end_are_noticed(tmp_path: Path, sets: dict[str, list[bytes]]) -> None:
    """Guards against tars that a larger set left behind the last one, and a tar that went while its table stayed."""
    _pack(str(tmp_path / "folder"), "x", tmp_path / "out", per_tar=2)
    before = tree(tmp_path / "out")
    (tmp_path / "out/00001.tar").unlink()
    with pytest.raises(PlanError, match=r"00001\.parquet has no tar"):
        _pack(str(tmp_path / "folder"), "x", tmp_path / "out", per_tar=2)
    (tmp_path / "out/00001.parquet").unlink()
    _pack(str(tmp_path / "folder"), "x", tmp_path / "out", per_tar=2)
    assert tree(tmp_path / "out") == before
    for name in ("deep/3.png", "z.jpg"):
        (tmp_path / "folder" / name).unlink()
    with pytest.raises(PlanError, match=r"00002\.tar is of other images"):
        _pack(str(tmp_path / "folder"), "x", tmp_path / "out", per_tar=2)


def test_odd_names_and_kinds_are_packed(tmp_path: Path) -> None:
    """Guards a whole set against one name: "::", which fsspec reads as a file inside another, bytes that are no UTF-8,
    links in a tar; and pictures of phones (MPO, JPEGs of two views) against being left out."""
    phone, view = io.BytesIO(), Image.new("RGB", (20, 20))
    view.save(phone, "MPO", save_all=True, append_images=[view])
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ("a::b", "a#b", "a%20b", "a?*[b]", "\udce9"):
        (folder / f"{name}.jpg").write_bytes(phone.getvalue())
    (folder / "last.jpg").write_bytes(_image(1, "PPM"))
    assert _pack(str(folder), "x", tmp_path / "out") == (6, 1)
    rows = pq.read_table(tmp_path / "out/00000.parquet").to_pylist()
    assert len({row["url"] for row in rows}) == 6 and rows[-1]["url"].endswith("/\\udce9.jpg")
    assert next(row["error_message"] for row in rows if row["error_message"]).startswith("PPM is none of JPEG")
    with tarfile.open(tmp_path / "out/00000.tar") as archive:
        assert all(name.endswith(".jpg") for name in archive.getnames())
    _tar(
        tmp_path / "links.tar",
        ("a.jpg", _image(1)),
        ("b.jpg", "a.jpg"),
        ("c.jpg", _image(2)),
        ("\udce9.jpg", _image(3)),
    )
    assert _pack(str(tmp_path / "links.tar"), "x", tmp_path / "links") == (4, 1)


@pytest.mark.parametrize("name", ["", " ", "a\nb"])
def test_a_name_that_nobody_can_ask_for_is_refused(tmp_path: Path, sets: dict[str, list[bytes]], name: str) -> None:
    """Guards against a set that no `where: dataset = …` finds."""
    with pytest.raises(PlanError, match="--name"):
        _pack(str(tmp_path / "folder"), name, tmp_path / "out")


def test_the_commands(tmp_path: Path, sets: dict[str, list[bytes]]) -> None:
    """Guards the words that the README and the recipes name: pack, and entries with the paper's thresholds."""
    told = CliRunner().invoke(app, ["pack", str(tmp_path / "folder"), "--name", "x", "--out", str(tmp_path / "x")])
    assert told.exit_code == 0 and "6 images of x, of which 1 cannot be opened" in told.output.replace("\n", "")
    wordnet = tmp_path / "dict"
    wordnet.mkdir()
    (wordnet / "index.noun").write_text("  1 licence\nhot_dog n 1 0 1 0 07\n")
    (wordnet / "index.sense").write_text("no%index 1\n")
    for name, line in (
        ("uni", "cat\t100\nrare\t99\n"),
        ("bi", "new york\t30\nof the\t2\n"),
        ("views", "The Cat\t70\n"),
    ):
        (tmp_path / name).write_text(line)
    out = tmp_path / "entries.txt"
    words = ["entries", "--out", str(out), "--wordnet", str(wordnet), "--unigrams", str(tmp_path / "uni")]
    words += ["--bigrams", str(tmp_path / "bi"), "--titles", str(tmp_path / "views")]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert out.read_text().splitlines()[99:] == ["99", "hot dog", "cat", "new york", "The Cat"]
    assert CliRunner().invoke(app, ["entries", "--out", str(out)]).exit_code == 2
    assert CliRunner().invoke(app, ["entries", "--out", str(out), "--wordnet", str(tmp_path)]).exit_code == 2


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"caf\xe9\t500\n", "no text in UTF-8"), (b"\x1f\x8b\x08\0", "unpack it first"), (b"", "holds no line"),
     (b"a\t1\nb\tnan\n", "line 2: expected a name"), (None, "cannot be read")],
)  # fmt: skip
def test_broken_counts_are_refused(tmp_path: Path, data: bytes | None, words: str) -> None:
    """Guards against a traceback of Python, and against a list that NaN put out of order or that lacks a whole
    source."""
    (tmp_path / "views").write_bytes(data) if data is not None else None
    told = CliRunner().invoke(app, ["entries", "--titles", str(tmp_path / "views"), "--out", str(tmp_path / "e.txt")])
    assert told.exit_code == 2 and words in " ".join(told.output.split())
    assert not (tmp_path / "e.txt").exists()


def test_entries_are_whole_and_read_back(tmp_path: Path) -> None:
    """Guards against a first word that begins with a mark of byte order and so never matches, a word lost to its rarer
    spelling in the same file, a folder that is not there yet, and a list that `balance.entries` cannot read."""
    (tmp_path / "uni").write_text("\ufefffirst\t500\nx\t200\nx\t5\n", encoding="utf-8")
    words = ["entries", "--unigrams", str(tmp_path / "uni"), "--out"]
    assert CliRunner().invoke(app, [*words, str(tmp_path / "new/e.txt")]).exit_code == 0
    assert read_entries(str(tmp_path / "new/e.txt"))[100:] == ["first", "x"]
    assert CliRunner().invoke(app, [*words, str(tmp_path / "e.json")]).exit_code == 2

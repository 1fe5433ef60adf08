"""Weights: found by content, pulled with resume, refused when they are not what they should be."""

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from curate.errors import WeightsError
from curate.score import weights
from curate.score.weight_files import sha256_of
from curate.score.weight_manifest import MANIFEST, Weight
from curate.score.weight_ref import WeightRef

SHARED = os.environ.get("CURATE_SHARED")
CONTENT = bytes(range(256)) * 5000


@contextmanager
def served(cut_first: bool = False) -> Iterator[tuple[str, list[str | None]]]:
    """A server of CONTENT that knows ranges; the first answer may end half way. Yields its URL and the ranges seen."""
    ranges: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            ranges.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            if start >= len(CONTENT):
                self.send_error(416)
                return
            body = CONTENT[start:]
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut_first and len(ranges) == 1 else body)

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/a%20model.onnx", ranges
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine: no CURATE_WEIGHTS, an own cache."""
    monkeypatch.setenv("CURATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CURATE_WEIGHTS", str(tmp_path / "given"))
    return tmp_path


def entry(url: str, sha256: str | None = None) -> Weight:
    return Weight("toy", "MIT", "nothing", sha256 or hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), url)


def test_found_by_content_whatever_the_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a folder that only works under published names, and against a same-sized stranger being taken."""
    monkeypatch.setitem(MANIFEST, "toy", entry("http://127.0.0.1:1/m.onnx"))
    (place / "given" / "deep").mkdir(parents=True)
    (place / "given" / "m.onnx").write_bytes(b"x" * len(CONTENT))
    assert weights.find(MANIFEST["toy"]) is None
    assert weights.check(["toy"]) == [(MANIFEST["toy"], "wrong content")]
    (place / "given" / "deep" / "renamed.bin").write_bytes(CONTENT)
    assert weights.find(MANIFEST["toy"]) == place / "given" / "deep" / "renamed.bin"
    assert weights.check(["toy"]) == [(MANIFEST["toy"], "ok")]
    assert weights.require("toy", "score.a").name == "renamed.bin"


def test_hash_is_remembered_until_the_file_changes(place: Path) -> None:
    """Guards against hashing gigabytes in each plan, and against trusting a file that was replaced."""
    file = place / "w.bin"
    file.write_bytes(b"one")
    assert sha256_of(file) == sha256_of(file) == hashlib.sha256(b"one").hexdigest()
    assert (place / "cache" / "sha256.json").is_file()
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert sha256_of(file) == hashlib.sha256(b"two").hexdigest()


def test_pull_resumes_and_verifies(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a cut download starting over, being taken for whole, or having other content."""
    with served(cut_first=True) as (url, ranges):
        monkeypatch.setitem(MANIFEST, "toy", entry(url))
        with pytest.raises(WeightsError, match="run the command again to resume"):
            weights.pull(["toy"])
        assert weights.check(["toy"])[0][1] == "missing"
        seen: list[int] = []
        (path,) = weights.pull(["toy"], lambda done, total: seen.append(done))
        assert path.read_bytes() == CONTENT and path.name == "a model.onnx"
        assert ranges == [None, f"bytes={len(CONTENT) // 2}-"] and seen[-1] == len(CONTENT)
        assert weights.pull(["toy"]) == [path] and len(ranges) == 2
        monkeypatch.setitem(MANIFEST, "toy", entry(url, "0" * 64))
        with pytest.raises(WeightsError, match="the manifest has 0000"):
            weights.pull(["toy"])
        assert weights.find(MANIFEST["toy"]) is None


def test_missing_weights_name_the_command(place: Path) -> None:
    """Guards against an error that leaves the user to find out what to do."""
    with pytest.raises(WeightsError, match=r"score\.faces: yunet-n-dynamic is not on this machine; `curate weights"):
        weights.require("yunet-n-dynamic", "score.faces")
    with pytest.raises(WeightsError, match="no weights 'yunett' in the manifest"):
        WeightRef("score.a.weights", "yunett").path()
    with pytest.raises(WeightsError, match=r"no file /none/w\.onnx"):
        WeightRef("score.a.weights", "/none/w.onnx").path()


def test_the_manifest_is_whole() -> None:
    """Guards against an entry that cannot be had, or whose licence or input nobody wrote down."""
    for weight in weights.ls():
        item = weight.weight
        assert item.licence and item.input and item.source and (item.url or item.hub or item.sha256)
        assert item.sha256 is None or len(item.sha256) == 64


@pytest.mark.skipif(SHARED is None, reason="CURATE_SHARED is not set: no published files here")
def test_published_files_are_recognised(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a wrong hash in the manifest: the real files must answer to their names."""
    monkeypatch.setenv("CURATE_WEIGHTS", str(Path(str(SHARED), "reference")))
    found = {held.weight.name: held.path for held in weights.ls() if held.path is not None}
    assert {"laion-nsfw-l14", "laion-nsfw-b32", "yunet-n-dynamic", "yunet-n-640", "aesthetic-v1-b16"} <= set(found)
    assert "gantman-mobilenet-v2" in found
    assert found["aesthetic-v2-sac-logos-ava1-l14-linear"].name == "sac+logos+ava1-l14-linearMSE.pth"  # type: ignore[union-attr]


def test_a_file_without_published_sha256_is_pinned_by_its_first_pull(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against another content of the same name being taken once the first was seen, from folder or server."""
    with served() as (url, _):
        monkeypatch.setitem(MANIFEST, "toy", Weight("toy", "MIT", "nothing", url=url))
        given = place / "given" / "a model.onnx"
        given.parent.mkdir()
        given.write_bytes(b"the user's word")
        assert weights.check(["toy"]) == [(MANIFEST["toy"], "unverified")]
        given.unlink()
        (pulled,) = weights.pull(["toy"])
        assert weights.check(["toy"]) == [(MANIFEST["toy"], "ok")]
        given.write_bytes(b"x" * len(CONTENT))
        assert weights.find(MANIFEST["toy"]) == pulled
        pulled.write_bytes(b"y" * len(CONTENT))
        os.utime(pulled, ns=(1, 1))
        assert weights.check(["toy"]) == [(MANIFEST["toy"], "wrong content")]
        assert weights.pull(["toy"]) == [pulled] and pulled.read_bytes() == CONTENT
        monkeypatch.setattr(f"{__name__}.CONTENT", CONTENT[::-1])
        pulled.unlink()
        with pytest.raises(WeightsError, match="of the first pull, has"):
            weights.pull(["toy"])

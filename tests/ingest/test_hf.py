"""hf:// through the real client, against a server on this machine that answers as the Hub does."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.ingest.pool import write_parquet

COMMIT = "a" * 40
INGEST = """
import sys
from curate.config import IngestSettings
from curate.ingest.step import ingest_step
from curate.metrics import progress
from curate.store import Store

store = Store(sys.argv[1])
settings = IngestSettings(sources=["hf://datasets/owner/urls/data/*.parquet"])
step = ingest_step(settings, store)
with progress("ingest", 1) as ticker:
    step.run(store, [], map, ticker)
samples = ingest_step(settings, store).tables[0]
assert ingest_step(settings, store).done(store, [])
print([store.read(samples, shard.name, ["url"]).column("url").to_pylist() for shard in store.shards(samples)])
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """A Hub with one dataset, owner/urls, of two Parquet files."""
    for number in range(2):
        write_parquet(tmp_path / f"{number}.parquet", {"url": [f"http://a/{number}"], "text": ["x"]})

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

        def _answer(self, data: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.endswith("/tree/main"):
                self._answer(json.dumps([{"type": "directory", "oid": "c" * 40, "size": 0, "path": "data"}]).encode())
            elif path.endswith("/tree/main/data"):
                files = sorted(tmp_path.glob("*.parquet"))
                entries = [{"type": "file", "oid": file.stem * 40, "size": file.stat().st_size,
                            "path": f"data/{file.name}"} for file in files]  # fmt: skip
                self._answer(json.dumps(entries).encode())
            elif path == "/api/datasets/owner/urls":
                self._answer(json.dumps({"id": "owner/urls", "sha": COMMIT, "siblings": [], "tags": []}).encode())
            elif "/resolve/" in path:
                data = (tmp_path / path.rpartition("/")[2]).read_bytes()
                low, _, high = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
                self._answer(data[int(low) : int(high or len(data)) + 1], 206)
            else:
                self._answer(b"{}", 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_tables_of_the_hub(hub: str, tmp_path: Path) -> None:
    """Guards against hf:// that needs a download by hand; the client reads its endpoint when it is imported."""
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", INGEST, str(tmp_path / "root")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[['http://a/0'], ['http://a/1']]", done.stderr

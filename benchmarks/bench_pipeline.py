"""The whole line on drawn images: what each stage costs, and what Ray adds to the same work done in one process.

    python benchmarks/bench_pipeline.py --images 5000

Draws the images, serves them from a process of its own on 127.0.0.1, and runs the same recipe twice into fresh roots:
inline, then on Ray with one worker per stage. Prints images/s and CPU-seconds per stage, peak memory of the process
tree, and the ratio of the two engines. The releases must be equal, byte for byte.
"""

import argparse
import hashlib
import http.server
import multiprocessing
import platform
import shutil
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from curate.config import parse_recipe
from curate.demo.drawing import draw
from curate.demo.paths import weights_dir
from curate.engine.job import Job, StepRecord
from pipelines import image_text

KINDS = ("shapes", "scene", "document", "chart", "sign")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """HTTP/1.1 with connections kept open, no log lines."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def serve(folder: Path, ready: "multiprocessing.connection.Connection") -> None:
    """Serve a folder until killed; sends its port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    ready.send(server.server_address[1])
    server.serve_forever()


class Tree:
    """CPU-seconds and peak resident memory of a process and its descendants while a block runs, sampled."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self._own = psutil.Process()
        self._skip = names
        self.cpu_s = self.peak_mb = self.wall_s = 0.0

    def __enter__(self) -> "Tree":
        self._seen: dict[int, float] = {}
        self._stop = threading.Event()
        self._start = time.perf_counter()
        self._base = sum(self._own.cpu_times()[:2])
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self._sample()

    def _sample(self) -> None:
        memory = self._own.memory_info().rss
        for child in self._own.children(recursive=True):
            try:
                if child.pid not in self.ignored:
                    self._seen[child.pid] = sum(child.cpu_times()[:2])
                    memory += child.memory_info().rss
            except psutil.Error:
                continue
        self.peak_mb = max(self.peak_mb, memory / 2**20)

    ignored: frozenset[int] = frozenset()

    def __exit__(self, *_: object) -> None:
        self._sample()
        self._stop.set()
        self.wall_s = time.perf_counter() - self._start
        self.cpu_s = sum(self._own.cpu_times()[:2]) - self._base + sum(self._seen.values())


def make_images(folder: Path, count: int) -> None:
    """Draw `count` images and the table of their URLs' paths and captions."""
    rows = []
    for number in range(count):
        drawing = draw(KINDS[number % len(KINDS)], 1_000_000 + number)
        name = f"{number:06d}.jpg"
        drawing.image.convert("RGB").save(folder / name, quality=90)
        rows.append({"path": name, "text": drawing.caption})
    pq.write_table(pa.Table.from_pylist(rows), folder / "paths.parquet")


def recipe(root: Path, table: Path, engine: str, shard: int) -> dict[str, object]:
    """The demo's recipe, without its small web's oddities."""
    return {
        "root": str(root), "ingest": {"sources": [str(table)], "rows_per_shard": shard},
        "fetch": {"allow_networks": ["127.0.0.1/32"]},
        "score": {
            "clip_demo": {"scorer": "clip", "model": f"local-dir:{weights_dir()}"}, "phash": {"scorer": "phash"},
            "text": {"scorer": "text_stats"},
        },
        "dedup": [{"by": "sha256"}, {"by": "image_phash"}],
        "subsets": {"half": {"where": "NOT is_duplicate", "keep_top": {"by": "clip_similarity_demo", "fraction": 0.5}}},
        "emit": {"samples_per_shard": 1000},
        "engine": {"driver": engine, "workers": {"fetch": 1, "score": 1, "score_text": 1, "select": 1}},
    }  # fmt: skip


def run(settings: dict[str, object], ignored: frozenset[int]) -> tuple[Tree, list[StepRecord]]:
    """One run into a fresh root."""
    Tree.ignored = ignored
    with Tree() as tree:
        job = Job(parse_recipe(settings))
        image_text.run(job)
        job.close()
    return tree, job.records


def digest(root: Path) -> str:
    """sha256 over every tar and manifest of the release, in order of name."""
    found = hashlib.sha256()
    for path in sorted((root / "releases").rglob("*")):
        if path.suffix in (".tar", ".parquet"):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def main() -> None:
    """Draw, serve, run twice, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--shard", type=int, default=500, help="rows per shard")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="curate-bench-"))
    (work / "web").mkdir()
    print(f"drawing {options.images} images", flush=True)
    make_images(work / "web", options.images)
    here, there = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(work / "web", there), daemon=True)
    server.start()
    port = here.recv()
    table = pq.read_table(work / "web" / "paths.parquet")
    urls = [f"http://127.0.0.1:{port}/{path}" for path in table.column("path").to_pylist()]
    pq.write_table(pa.table({"url": urls, "text": table.column("text")}), work / "urls.parquet")
    ignored = frozenset({server.pid or 0})
    results = {
        engine: run(recipe(work / engine, work / "urls.parquet", engine, options.shard), ignored)
        for engine in ("inline", "ray")
    }
    machine = f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total >> 30} GiB, {platform.machine()}"
    print(f"\nmachine: {machine}; load before: {psutil.getloadavg()[0]:.1f}")
    print("\n| engine | stage | wall s | images/s | CPU s | CPU ms/image |\n|---|---|---|---|---|---|")
    for engine, (_, records) in results.items():
        for record in (record for record in records if record.cost.wall_s):
            rate, each = options.images / record.cost.wall_s, 1000 * record.cost.cpu_s / options.images
            print(
                f"| {engine} | {record.name} | {record.cost.wall_s:.1f} | {rate:.0f} | {record.cost.cpu_s:.1f} "
                f"| {each:.1f} |"
            )
    print("\n| engine | whole run, wall s | images/s | CPU s of all processes | peak MB |\n|---|---|---|---|---|")
    for engine, (tree, _) in results.items():
        print(
            f"| {engine} | {tree.wall_s:.1f} | {options.images / tree.wall_s:.0f} | {tree.cpu_s:.1f} "
            f"| {tree.peak_mb:.0f} |"
        )
    inline, ray = results["inline"][0], results["ray"][0]
    print(f"\nRay / inline: wall {ray.wall_s / inline.wall_s:.2f}, CPU {ray.cpu_s / inline.cpu_s:.2f}")
    print(f"releases equal: {digest(work / 'inline') == digest(work / 'ray')}")
    server.terminate()
    shutil.rmtree(work)


if __name__ == "__main__":
    main()

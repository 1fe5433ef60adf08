"""What ingest costs: rows a second, CPU and peak memory on a generated table; beside it, the least any ingest must do.

The floor reads the same Parquet files with Arrow and writes the same columns back, in one process: no keys, no
duplicates, no shards. Run:  python benchmarks/bench_ingest.py --rows 20000000
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

GENERATED_ROWS = 500_000  # at once


def generate(folder: Path, rows: int, files: int, repeats: float) -> None:
    """COYO-like tables: URLs of about 90 bytes, captions of about 60, a share of rows repeated from anywhere before."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    per_file = -(-rows // files)
    for number in range(files):
        first = number * per_file
        with pq.ParquetWriter(folder / f"part-{number:05d}.parquet", _schema(), compression="snappy") as writer:
            for start in range(first, min(first + per_file, rows), GENERATED_ROWS):
                count = min(GENERATED_ROWS, min(first + per_file, rows) - start)
                ids = np.arange(start, start + count)
                again = rng.random(count) < repeats
                ids[again] = (rng.random(int(again.sum())) * ids[again]).astype(np.int64)
                writer.write_table(_table(ids))


def _schema() -> pa.Schema:
    return pa.schema([("id", pa.int64()), ("url", pa.string()), ("text", pa.string()), ("width", pa.int32()),
                      ("height", pa.int32()), ("clip_similarity_vitl14", pa.float32())])  # fmt: skip


def _table(ids: np.ndarray) -> pa.Table:
    plain = pa.array(ids)
    text = plain.cast(pa.string())
    mixed = pa.array((ids * 2654435761) % 2**32).cast(pa.string())
    url = pc.binary_join_element_wise(
        "https://images.example.org/storage/", mixed, "/products/a-picture-of-a-thing-", text, ".jpg", ""
    )
    caption = pc.binary_join_element_wise("A picture of thing number ", text, " on a table, seen from side ", mixed, "")
    width = pa.array((ids % 1800 + 100).astype(np.int32))
    height = pa.array((ids % 1300 + 100).astype(np.int32))
    similarity = pa.array((ids % 1000 / 2500).astype(np.float32))
    return pa.table([plain, url, caption, width, height, similarity], schema=_schema())


WORK = {
    "ingest": """
import sys; from curate.config import EngineSettings, IngestSettings; from curate.store import Store
from curate.ingest.step import ingest_step; from curate.metrics import progress
settings = IngestSettings(sources=[sys.argv[1]], where=sys.argv[3] or None); store = Store(sys.argv[2])
step = ingest_step(settings, store)
with progress("ingest", 1) as ticker: print(dict(step.run(store, [], map, ticker)))
""",
    "again": """
import sys; from curate.config import IngestSettings; from curate.store import Store
from curate.ingest.step import ingest_step
store = Store(sys.argv[2]); step = ingest_step(IngestSettings(sources=[sys.argv[1]], where=sys.argv[3] or None), store)
assert step.done(store, [])
""",
    "read and write": """
import sys, glob, os; import pyarrow.parquet as pq; from pathlib import Path
Path(sys.argv[2]).mkdir(parents=True)
for path in sorted(glob.glob(sys.argv[1] + "/*.parquet")):
    with pq.ParquetFile(path) as file, pq.ParquetWriter(
            Path(sys.argv[2]) / Path(path).name, file.schema_arrow, compression="zstd") as out:
        for batch in file.iter_batches(32768, use_threads=False): out.write_batch(batch)
""",
}


def measure(work: str, source: Path, out: Path, where: str) -> tuple[float, float, float]:
    """(wall s, CPU s, peak resident MB) of a fresh process that does the work."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", WORK[work], str(source), str(out), where], env=os.environ)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{work} failed")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--repeats", type=float, default=0.1, help="share of rows that repeat an earlier one")
    parser.add_argument("--where", default="", help="e.g. 'width >= 200'")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        generate(folder / "tables", given.rows, given.files, given.repeats)
        size = sum(path.stat().st_size for path in (folder / "tables").iterdir()) / 2**20
        outs = {"read and write": folder / "copy", "ingest": folder / "root", "again": folder / "root"}
        results = {work: measure(work, folder / "tables", out, given.where) for work, out in outs.items()}
    finally:
        shutil.rmtree(folder)
    floor = results["read and write"][1]
    print(
        f"\n{given.rows:,} rows in {given.files} Parquet files ({size:,.0f} MB), {given.repeats:.0%} repeats, 1 process"
    )
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print("| work | wall s | CPU s | rows/CPU-s | times the floor (CPU) | peak RSS MB |\n|---|---|---|---|---|---|")
    for work, (wall, cpu, peak) in results.items():
        print(f"| {work} | {wall:.1f} | {cpu:.1f} | {given.rows / cpu:,.0f} | {cpu / floor:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()

"""Emission against plain ways of doing its work, on the same members in one run.

    python benchmarks/bench_emit.py                         # throughput and the 1.3 % subset
    python benchmarks/bench_emit.py --part memory           # peak memory on 200,000 samples

Rivals: `webdataset.ShardWriter` in a loop over the same samples in the same order; a scan-and-repack with Python's
`tarfile` (what most resharders do: read every source tar from end to end, write the chosen members); `tar` itself,
which unpacks all and packs what was chosen. All write image, caption and JSON; none shuffles globally, checks, hashes
nor writes a manifest. Where they are at hand (`benchmarks/emit_rivals.py` says why they may not be):

    --resharder FILE --resharder-python PYTHON    DataComp's resharder.py, one worker; PYTHON has webdataset<0.2.49,
                                                  pysimdjson, cloudpathlib, img2dataset; takes our exported uid file
    --data-juicer-python PYTHON                   PYTHON has py-data-juicer and Ray; its exporter writes the chosen
                                                  images from files, which it is given unpacked

Floors: ours at least half of the ShardWriter loop's MB/s, a 1.3 % subset reads at least 20 times less than a scan, 500
MB at 200,000 samples.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from emit_rivals import run_data_juicer, run_resharder

from curate.config import Recipe, parse_recipe
from curate.emit.exports import export_datacomp, only_subset
from curate.emit.step import EmitStep, emit_step, latest_release
from curate.metrics import Stopwatch, progress
from curate.schema import IMAGES_SCHEMA, KEY, SAMPLE_FIELDS, Shard, TableSpec, inputs_of, keys_of
from curate.store import Store
from curate.tar import TarWriter

SAMPLES = TableSpec("samples", 1, pa.schema(SAMPLE_FIELDS), open_schema=True)
IMAGES = TableSpec("images", 1, IMAGES_SCHEMA, inputs=inputs_of([SAMPLES]), with_images=True)
NAMES = [f"score_{number}" for number in range(10)]
SCORES = TableSpec("scores_x", 1, pa.schema([KEY, *(pa.field(name, pa.float32()) for name in NAMES)]))
FIELDS = [KEY, pa.field("member", pa.bool_(), nullable=False), pa.field("reason", pa.string())]


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    mb_written: float
    mb_read: float
    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Rivals:
    """Programs that may not be here."""

    resharder: str | None
    resharder_python: str
    data_juicer_python: str | None


def member_spec(subset: str) -> TableSpec:
    """The table of a subset whose members the benchmark draws itself."""
    return TableSpec(f"member_{subset}", 1, pa.schema(FIELDS))


def make_pool(store: Store, rows: int, size: int, rows_per_shard: int, shares: dict[str, float]) -> list[Shard]:
    """Tables and tars of random bytes (`size` bytes an image on average), members drawn by share."""
    draw = random.Random(1)
    noise = draw.randbytes(4 * size + 1_000_000)
    shards = []
    for start in range(0, rows, rows_per_shard):
        shard = Shard(f"pool-{start // rows_per_shard:05d}", min(rows_per_shard, rows - start))
        urls = [f"https://host-{row % 997}.example/pictures/{row}.jpg" for row in range(start, start + shard.rows)]
        texts = [f"a caption of the usual length, some sixty characters, {row}" for row in range(shard.rows)]
        keys = keys_of(urls, texts)
        path = store.shard_path(IMAGES, shard.name, ".tar")
        images = []
        with store.staged(path) as local, local.open("wb") as stream:
            tar = TarWriter(stream)
            for row, key in enumerate(keys):
                length, at = draw.randrange(size // 2, size * 3 // 2), draw.randrange(1_000_000)
                place = tar.add(f"{key}.jpg", noise[at : at + length])
                tar.add(f"{key}.txt", texts[row].encode())
                record = {"key": key, "uid": key, "url": urls[row], "text": texts[row]}
                tar.add(f"{key}.json", json.dumps(record).encode())
                images.append({"key": key, "status": "ok", "ext": "jpg", "width": 512, "height": 384, "sha256": key * 2,
                               "tar": path, "offset": place, "length": length})  # fmt: skip
            tar.finish()
        store.write(SAMPLES, shard, pa.table([keys, urls, texts], schema=SAMPLES.schema))
        store.write(IMAGES, shard, pa.Table.from_pylist(images, schema=IMAGES_SCHEMA))
        columns = [pa.array([draw.random() for _ in keys], pa.float32()) for _ in NAMES]
        store.write(SCORES, shard, pa.table([keys, *columns], schema=SCORES.schema))
        for subset, share in shares.items():
            member = [draw.random() < share for _ in keys]
            store.write(
                member_spec(subset), shard, pa.table([keys, member, [None] * len(keys)], schema=pa.schema(FIELDS))
            )
        shards.append(shard)
    return shards


def recipe_for(subset: str, samples_per_shard: int) -> Recipe:
    """A recipe with one subset."""
    return parse_recipe({"root": "x", "ingest": {"sources": ["x"]}, "subsets": {subset: {}},
                         "emit": {"samples_per_shard": samples_per_shard}})  # fmt: skip


def step_for(subset: str, shards: Sequence[Shard], samples_per_shard: int) -> EmitStep:
    """The step that emits one subset."""
    recipe = recipe_for(subset, samples_per_shard)
    tables = [SAMPLES, IMAGES, SCORES]
    return emit_step(recipe.emit, recipe, tables, {subset: member_spec(subset)}, shards, {}, {})


def ours(store: Store, shards: Sequence[Shard], subset: str, samples_per_shard: int) -> tuple[Row, list[str]]:
    """Emit with curate; returns the line and the keys in order."""
    step = step_for(subset, shards, samples_per_shard)
    with Stopwatch() as watch, progress("emit", len(shards)) as ticker:
        counts = step.run(store, shards, map, ticker)
    manifest = pq.read_table(store.full(f"releases/{latest_release(store)}/manifest.parquet"), columns=["key"])
    row = Row(f"curate, {subset}", counts["bytes_written"] / 1e6, counts["bytes_read"] / 1e6, *_times(watch))
    return row, manifest.column("key").to_pylist()


def webdataset_loop(store: Store, shards: Sequence[Shard], keys: Sequence[str], folder: Path, per_tar: int) -> Row:
    """webdataset's ShardWriter over the same samples in the same order, read at their places."""
    import webdataset

    folder.mkdir()
    with Stopwatch() as watch:
        facts = {}
        for shard in shards:
            for row in store.read_joined([(IMAGES, None), (SAMPLES, None), (SCORES, None)], shard.name).to_pylist():
                facts[row["key"]] = row
        read = 0
        with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=per_tar, verbose=0) as sink:
            for key in keys:
                row = facts[key]
                (image,) = store.read_ranges(row["tar"], [row["offset"]], [row["length"]])
                read += len(image)
                sink.write({"__key__": key, "jpg": image, "txt": row["text"], "json": row})
    return Row("webdataset.ShardWriter loop", _size(folder) / 1e6, read / 1e6, *_times(watch))


def scan(store: Store, shards: Sequence[Shard], keys: Sequence[str], folder: Path) -> Row:
    """Read all source tars from end to end and write the chosen members, one output tar for each source tar."""
    folder.mkdir()
    wanted = set(keys)
    read = 0
    with Stopwatch() as watch:
        for shard in shards:
            path = Path(store.full(store.shard_path(IMAGES, shard.name, ".tar")))
            read += path.stat().st_size
            with tarfile.open(path, "r|") as source, tarfile.open(folder / path.name, "w") as target:
                for info in source:
                    data = source.extractfile(info)
                    content = data.read() if data else b""  # a pipe cannot skip; nor can most resharders
                    if info.name.partition(".")[0] in wanted:
                        target.addfile(info, BytesIO(content))
    return Row("scan and repack (tarfile)", _size(folder) / 1e6, read / 1e6, *_times(watch))


def unpack_and_pack(store: Store, shards: Sequence[Shard], keys: Sequence[str], folder: Path) -> Row:
    """GNU tar: every source tar is unpacked, the chosen members are packed, one output tar for each source tar."""
    wanted = set(keys)
    read = 0
    (folder / "out").mkdir(parents=True)
    with Stopwatch() as watch:
        for shard in shards:
            path = Path(store.full(store.shard_path(IMAGES, shard.name, ".tar")))
            read += path.stat().st_size
            loose = folder / "loose"
            loose.mkdir()
            subprocess.run(["tar", "-xf", path, "-C", loose], check=True)
            chosen = sorted(one.name for one in loose.iterdir() if one.name.partition(".")[0] in wanted)
            (folder / "chosen").write_text("\n".join(chosen))
            subprocess.run(["tar", "-cf", folder / "out" / path.name, "-C", loose, "-T", folder / "chosen"], check=True)
            shutil.rmtree(loose)
    return Row("tar -x, tar -c", _size(folder / "out") / 1e6, read / 1e6, *_times(watch))


def resharder(store: Store, shards: Sequence[Shard], folder: Path, per_tar: int, rivals: Rivals) -> Row:
    """DataComp's resharder over the same tars, by the uid file that we export for it from the latest release."""
    release = store.full(f"releases/{latest_release(store)}")
    ids = export_datacomp(release, only_subset(release, None), folder)
    tars = [Path(store.full(store.shard_path(IMAGES, shard.name, ".tar"))) for shard in shards]
    with Stopwatch() as watch:
        sizes = [shard.rows for shard in shards]
        run_resharder(rivals.resharder_python, str(rivals.resharder), tars, sizes, ids, folder, per_tar)
    written = sum(path.stat().st_size for path in (folder / "out").glob("*.tar"))
    samples = sum(len(_images_in(path)) for path in (folder / "out").glob("*.tar"))
    assert samples == len(np.load(ids)), f"{samples} samples found, {len(np.load(ids))} asked for"
    read = sum(tar.stat().st_size for tar in tars)
    return Row("DataComp's resharder, its start included", written / 1e6, read / 1e6, *_times(watch))


def data_juicer(
    store: Store, shards: Sequence[Shard], keys: Sequence[str], folder: Path, per_tar: int, python: str
) -> Row:
    """data-juicer's exporter over the chosen samples, unpacked for it beforehand."""
    wanted = set(keys)
    (folder / "images").mkdir(parents=True)
    read = 0
    with (folder / "rows.jsonl").open("w") as stream:
        for shard in shards:
            for row in store.read_joined([(IMAGES, None), (SAMPLES, None)], shard.name).to_pylist():
                if row["key"] not in wanted:
                    continue
                (image,) = store.read_ranges(row["tar"], [row["offset"]], [row["length"]])
                read += len(image)
                place = folder / "images" / f"{row['key']}.jpg"
                place.write_bytes(image)
                told = {"uid": row["key"], "url": row["url"], "text": row["text"], "image": str(place)}
                stream.write(json.dumps(told) + "\n")
    cost = run_data_juicer(python, folder / "rows.jsonl", folder / "out", per_tar)
    tars = list((folder / "out").glob("*.tar"))
    samples = sum(len(_images_in(path)) for path in tars)
    assert samples == len(keys), f"{samples} samples found, {len(keys)} asked for"
    return Row("data-juicer's export, without Ray's start", _size(folder / "out") / 1e6, read / 1e6,
               cost["wall_s"], cost["cpu_s"])  # fmt: skip


def _images_in(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        return [name for name in archive.getnames() if name.endswith(".jpg")]


def throughput(rows: int, size: int, rivals: Rivals) -> None:
    """The table of ways, and the ratios."""
    folder = Path(tempfile.mkdtemp(prefix="bench-emit-"))
    try:
        store = Store(str(folder / "root"))
        shards = make_pool(store, rows, size, 1000, {"half": 0.5, "few": 0.013})
        per_tar = 1000
        lines: list[Row] = []
        for subset in ("half", "few"):
            place = folder / subset
            place.mkdir()
            mine, keys = ours(store, shards, subset, per_tar)
            lines.append(mine)
            lines.append(webdataset_loop(store, shards, keys, place / "wds", per_tar))
            lines.append(scan(store, shards, keys, place / "scan"))
            lines.append(unpack_and_pack(store, shards, keys, place / "tar"))
            if rivals.resharder:
                lines.append(resharder(store, shards, place / "resharder", per_tar, rivals))
            if rivals.data_juicer_python:
                python = rivals.data_juicer_python
                lines.append(data_juicer(store, shards, keys, place / "data_juicer", per_tar, python))
            _print(lines, f"{subset}: {rows:,} samples of {size / 1000:.0f} kB; `python benchmarks/bench_emit.py`")
            for line in lines[1:]:
                print(f"- {line.what}: {_speed(mine) / _speed(line):.2f} × its MB per CPU-second, "
                      f"{line.mb_read / mine.mb_read:.1f} × our bytes read")  # fmt: skip
            lines.clear()
    finally:
        shutil.rmtree(folder)


def memory(rows: int) -> None:
    """Peak memory of a process that emits this many samples; the pool is made by another process."""
    folder = tempfile.mkdtemp(prefix="bench-emit-")
    try:
        command = [sys.executable, __file__, "--rows", str(rows), "--root", folder, "--part"]
        subprocess.run([*command, "make"], check=True)
        done = subprocess.run([*command, "emit"], check=True, capture_output=True, text=True)
        print(done.stdout.strip())
    finally:
        shutil.rmtree(folder)


def _emit_alone(root: str, rows: int) -> None:
    store = Store(root)
    shards = [Shard(name, 10_000) for name in sorted(store.done(SAMPLES))]
    before = _peak_mb()
    line, keys = ours(store, shards, "all", 10_000)
    print(f"{len(keys):,} samples: peak {_peak_mb():.0f} MB ({before:.0f} MB of it imports), floor 500 MB; "
          f"{line.wall_s:.1f} s, {line.cpu_s:.1f} CPU-s ({_machine()})")  # fmt: skip


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _times(watch: Stopwatch) -> tuple[float, float]:
    return watch.cost.wall_s, watch.cost.cpu_s


def _speed(line: Row) -> float:
    return line.mb_written / line.cpu_s


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _machine() -> str:
    return (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    )


def _print(lines: Sequence[Row], title: str) -> None:
    print(f"\n{title} ({_machine()})\n")
    print("| way | MB written | MB read | wall s | CPU s | MB/s | MB/CPU-s |\n|---|---|---|---|---|---|---|")
    for line in lines:
        print(f"| {line.what} | {line.mb_written:.1f} | {line.mb_read:.1f} | {line.wall_s:.2f} | {line.cpu_s:.2f} "
              f"| {line.mb_written / line.wall_s:.0f} | {line.mb_written / line.cpu_s:.0f} |")  # fmt: skip


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["throughput", "memory", "make", "emit"], default="throughput")
    parser.add_argument("--rows", type=int, help="samples in the pool (8,000; memory: 200,000)")
    parser.add_argument("--size", type=int, default=50_000, help="bytes of an image on average")
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--resharder", metavar="FILE", help="DataComp's resharder.py")
    parser.add_argument("--resharder-python", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--data-juicer-python", metavar="PYTHON")
    given = parser.parse_args()
    rivals = Rivals(given.resharder, given.resharder_python, given.data_juicer_python)
    parts: dict[str, Callable[[], object]] = {
        "throughput": lambda: throughput(given.rows or 8000, given.size, rivals),
        "memory": lambda: memory(given.rows or 200_000),
        "make": lambda: make_pool(Store(given.root), given.rows, 2000, 10_000, {"all": 1.0}),
        "emit": lambda: _emit_alone(given.root, given.rows),
    }
    parts[given.part]()


if __name__ == "__main__":
    main()

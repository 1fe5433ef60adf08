"""Fetching images: ours against img2dataset 1.47, on the same URLs, server and settings.

    python benchmarks/bench_fetch.py --n 5000              # HTTP and TLS, 256 border and 512 keep_ratio_largest
    python benchmarks/bench_fetch.py --part faults         # 10 % of hosts hang, 20 % are dead: ours with and without
    python benchmarks/bench_fetch.py --part kills --n 100000   # faults, two SIGKILLs: no row lost or fetched twice
    python benchmarks/bench_fetch.py --part transport      # which client library: bytes only, nothing decoded
        (httpx over HTTP/2 is left out unless `pip install "httpx[http2]"` was done)

The server is a process of its own; CPU seconds are those of the client and all its children. "CPU ms/image" leaves
out start-up (a run on 4 URLs), "with start-up" does not. Memory is the sum over the client's processes of their
proportional share (PSS), sampled five times a second. Over TLS the trusted certificates are the machine's own bundle
and the bench's CA, as they would be on a user's machine.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import certifi
import psutil

HERE = Path(__file__).resolve()
MODES = {
    "256 border": {"image_size": 256, "resize_mode": "border", "resize_only_if_bigger": False},
    "512 keep_ratio_largest": {"image_size": 512, "resize_mode": "keep_ratio_largest", "resize_only_if_bigger": True},
}
HOSTS = 40
SHARD_ROWS = 1000


@dataclass(frozen=True)
class Measure:
    """One run of a client process."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    result: dict


@contextmanager
def server(folder: Path):
    """The image server; gives its ports."""
    child = subprocess.Popen(
        [sys.executable, str(HERE.with_name("fetch_server.py")), str(folder)], stdout=subprocess.PIPE
    )
    try:
        yield json.loads(child.stdout.readline())
    finally:
        child.kill()
        child.wait()


def measure(arguments: list[str], folder: Path) -> Measure:
    """Run `bench_fetch.py client …` in a process group and meter it."""
    bundle = folder / "bundle.pem"
    bundle.write_bytes(Path(certifi.where()).read_bytes() + (folder / "ca.pem").read_bytes())
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "SSL_CERT_FILE": str(bundle)}
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, str(HERE), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    peak = [0.0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            total = 0.0
            try:
                for process in [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]:
                    total += process.memory_full_info().pss
            except psutil.Error:
                continue
            peak[0] = max(peak[0], total / 1e6)

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = os.times()
    out, err = child.communicate()
    after = os.times()
    ended.set()
    watcher.join()
    if child.returncode:
        sys.exit(f"{arguments} failed:\n{err.decode()[-3000:]}")
    wall = time.perf_counter() - start
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Measure(wall, cpu, peak[0], json.loads(out.splitlines()[-1]))


def urls(scheme: str, port: int, count: int) -> list[str]:
    """`count` URLs over HOSTS loopback addresses."""
    return [f"{scheme}://127.0.0.{2 + number % HOSTS}:{port}/{number}.jpg" for number in range(count)]


def client_ours(table: list[str], mode: str, extra: dict) -> dict:
    """Our stage through the runner: samples and images tables, tars, all as in a real run; one worker."""
    import pyarrow as pa

    from curate.config import FetchSettings
    from curate.fetch.stage import fetch_stage
    from curate.schema import SAMPLE_FIELDS, Shard, TableSpec, keys_of
    from curate.stage import run_shard
    from curate.store import Store

    rows = extra.pop("shard_rows", SHARD_ROWS)
    root = tempfile.mkdtemp(prefix="bench-ours-")
    store = Store(root)
    samples = TableSpec("samples", 1, pa.schema(SAMPLE_FIELDS))
    settings = FetchSettings(allow_networks=["127.0.0.0/8"], skip_reencode=False, **MODES[mode], **extra)
    stage = fetch_stage(settings, samples)
    stage.setup()
    counts: dict[str, int] = {}
    start = time.perf_counter()
    for number, first in enumerate(range(0, len(table), rows)):
        part = table[first : first + rows]
        texts = ["a caption"] * len(part)
        shard = Shard(f"{number:05d}", len(part))
        store.write(samples, shard, pa.table([keys_of(part, texts), part, texts], schema=samples.schema))
        for status, found in run_shard(store, stage, shard).counts.items():
            counts[status] = counts.get(status, 0) + found
    work = time.perf_counter() - start
    stage.teardown()
    shutil.rmtree(root)
    return {"counts": counts, "work_s": work}


def client_img2dataset(table: list[str], mode: str, extra: dict) -> dict:
    """img2dataset as its README runs it: 2 processes of 32 threads, webdataset output."""
    import img2dataset
    import pandas as pd

    folder = Path(tempfile.mkdtemp(prefix="bench-i2d-"))
    pd.DataFrame({"url": table, "caption": "a caption"}).to_parquet(folder / "urls.parquet")
    start = time.perf_counter()
    img2dataset.download(
        url_list=str(folder / "urls.parquet"), input_format="parquet", url_col="url", caption_col="caption",
        output_format="webdataset", output_folder=str(folder / "out"), processes_count=2, thread_count=32,
        number_sample_per_shard=SHARD_ROWS, encode_quality=95, enable_wandb=False, **MODES[mode], **extra,
    )  # fmt: skip
    work = time.perf_counter() - start
    counts: dict[str, int] = {}
    for path in (folder / "out").glob("*_stats.json"):
        for message, found in json.loads(path.read_text())["status_dict"].items():
            name = "ok" if message == "success" else message
            counts[name] = counts.get(name, 0) + found
    shutil.rmtree(folder)
    return {"counts": counts, "work_s": work}


CLIENTS = {"ours": client_ours, "img2dataset": client_img2dataset}


def run_client(name: str, table: list[str], mode: str, folder: Path, extra: dict | None = None) -> Measure:
    """One client on one table, in its own process."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(table, file)
        file.flush()
        return measure(["client", name, file.name, mode, json.dumps(extra or {})], folder)


def part_compare(arguments: argparse.Namespace, ports: dict) -> None:
    """The peers on the same table."""
    print("| transport, size | client | images/s | CPU ms/image | with start-up | peak MB | ok |")
    print("|---|---|---|---|---|---|---|")
    for scheme in arguments.schemes:
        for mode in arguments.modes:
            label = f"{scheme}, {mode}"
            seen: dict[str, tuple[float, float, float]] = {}
            for name in arguments.clients:
                idle = run_client(name, urls(scheme, ports[scheme], 4), mode, arguments.folder)
                got = run_client(name, urls(scheme, ports[scheme], arguments.n), mode, arguments.folder)
                rate = arguments.n / got.result["work_s"]
                each, whole = (1e3 * cpu / arguments.n for cpu in (got.cpu_s - idle.cpu_s, got.cpu_s))
                seen[name] = (rate, each, whole)
                ok = f"{got.result['counts'].get('ok', 0)}/{arguments.n}"
                row = (label, name, f"{rate:.0f}", f"{each:.2f}", f"{whole:.2f}", f"{got.peak_mb:.0f}", ok)
                print("| " + " | ".join(row) + " |", flush=True)
            if len(seen) == 2:
                ours, theirs = seen["ours"], seen["img2dataset"]
                ratios = (ours[0] / theirs[0], theirs[1] / ours[1], theirs[2] / ours[2])
                print(
                    f"| {label} | **ratio** | " + " | ".join(f"**{ratio:.1f}x**" for ratio in ratios) + " | | |",
                    flush=True,
                )


def part_faults(arguments: argparse.Namespace, ports: dict) -> None:
    """Ours on good hosts alone, then with as many bad hosts mixed in that 10 % hang and 20 % are dead."""
    good = urls("http", ports["http"], arguments.n)
    per_host = len(good) // HOSTS
    bad_hosts = round(HOSTS * 0.3 / 0.7)
    bad: list[str] = []
    for number in range(bad_hosts):
        port = ports["hang"] if number % 3 == 0 else 1  # nothing listens on port 1
        bad += [f"http://127.0.0.{100 + number}:{port}/{image}.jpg" for image in range(per_host)]
    mixed = [url for _, url in sorted((hash_of(url), url) for url in good + bad)]
    print("| table | rows | ok | good images/s | CPU ms/good image | share of rate |\n|---|---|---|---|---|---|")
    best = {"good hosts": 0.0, "10 % hang, 20 % dead": 0.0}
    for _ in range(arguments.repeats):  # in turns, and the best of each: other work on the machine only slows
        for label, table in zip(best, (good, mixed), strict=True):
            got = run_client("ours", table, "256 border", arguments.folder, {"shard_rows": 10_000})
            ok = got.result["counts"].get("ok", 0)
            rate = ok / got.result["work_s"]
            best[label] = max(best[label], rate)
            share = best[label] / best["good hosts"]
            print(
                f"| {label} | {len(table)} | {ok} | {rate:.0f} | {1e3 * got.cpu_s / max(ok, 1):.2f} | {share:.2f} |",
                flush=True,
            )


def part_kills(arguments: argparse.Namespace, ports: dict) -> None:
    """A table with faults, killed twice: rows in = rows out, and nothing is fetched again after its commit."""
    base = f"http://127.0.0.2:{ports['http']}/tiny/"
    root = Path(tempfile.mkdtemp(prefix="bench-kills-"))
    command = [sys.executable, str(HERE), "kills", str(root), base, str(arguments.n)]
    kept: list[dict[str, int]] = []  # at each kill: how often the URLs of committed shards had been asked for
    start = time.perf_counter()
    for goal in (37 * arguments.n // 100, 73 * arguments.n // 100, None):
        child = subprocess.Popen(command, start_new_session=True)
        while child.poll() is None:
            time.sleep(0.5)
            if goal is not None and sum(_counts(base).values()) >= goal:
                child.kill()
                child.wait()
                done = {int(path.stem) for path in (root / "images").glob("*/*.parquet")}
                kept.append({name: count for name, count in _counts(base).items() if int(name) // KILL_ROWS in done})
                break
        if goal is not None:
            assert child.returncode == -9, "ended before it could be killed"
    asked = _counts(base)
    late = {name for counts in kept for name, count in counts.items() if asked[name] > count}
    again = sum(count - 1 for count in asked.values())
    wrong = check_kills(root, arguments.n)
    assert not late and not wrong and len(asked) == arguments.n, (sorted(late)[:5], wrong[:5], len(asked))
    took = time.perf_counter() - start
    print("| rows in | rows out | wrong | requests again after a commit | again, in flight at a kill | s |")
    print("|---|---|---|---|---|---|")
    print(f"| {arguments.n} | {arguments.n} | {len(wrong)} | {len(late)} | {again} | {took:.0f} |")
    shutil.rmtree(root)


KILL_ROWS = 10_000


def _counts(base: str) -> dict[str, int]:
    import urllib.request

    with urllib.request.urlopen(base + "counts") as response:
        return json.loads(response.read())


def _tables(root: Path):
    import pyarrow as pa

    from curate.config import FetchSettings
    from curate.fetch.stage import fetch_stage
    from curate.schema import SAMPLE_FIELDS, TableSpec
    from curate.store import Store

    samples = TableSpec("samples", 1, pa.schema(SAMPLE_FIELDS))
    settings = FetchSettings(allow_networks=["127.0.0.0/8"], retries=0, per_host=64)
    return Store(str(root)), samples, fetch_stage(settings, samples)


def client_kills(root: Path, base: str, count: int) -> None:
    """Fetch all shards that are not committed."""
    import pyarrow as pa

    from curate.schema import Shard, keys_of
    from curate.stage import run_shard

    store, samples, stage = _tables(root)
    stage.setup()
    for first in range(0, count, KILL_ROWS):
        numbers = range(first, min(count, first + KILL_ROWS))
        part, texts = [f"{base}{number}.jpg" for number in numbers], ["a caption"] * len(numbers)
        shard = Shard(f"{first // KILL_ROWS:05d}", len(part))
        if not store.has(samples, shard.name):
            store.write(samples, shard, pa.table([keys_of(part, texts), part, texts], schema=samples.schema))
        run_shard(store, stage, shard)
    stage.teardown()


def check_kills(root: Path, count: int) -> list[tuple]:
    """Rows that are missing, out of order, or whose status is not that of their fault."""
    store, samples, stage = _tables(root)
    wrong = []
    for first in range(0, count, KILL_ROWS):
        name = f"{first // KILL_ROWS:05d}"
        found = store.read_joined([(samples, ["url"]), (stage.tables[0], ["status"])], name).to_pylist()
        for number, row in enumerate(found, start=first):
            fate = "http_4xx" if number % 10 == 3 else "http_5xx" if number % 10 == 7 else "ok"
            fate = "connect" if number % 50 == 11 else fate
            if row["status"] != fate or not row["url"].endswith(f"/{number}.jpg"):
                wrong.append((number, row["status"], row["error"]))
        if len(found) != min(KILL_ROWS, count - first):
            wrong.append((first, "rows", len(found)))
    return wrong


def hash_of(text: str) -> int:
    """A fixed shuffle."""
    import zlib

    return zlib.crc32(text.encode())


def part_transport(arguments: argparse.Namespace, ports: dict) -> None:
    """Client libraries on the bytes alone."""
    print("| library | transport | images/s | CPU ms/image | peak MB |\n|---|---|---|---|---|")
    for scheme in arguments.schemes:
        for name in ("aiohttp", "aiohttp-uvloop", "httpx", "httpx-h2", "pycurl", "pycurl-h2", "urllib-threads"):
            two = name.endswith("-h2")
            if two and (scheme == "http" or "h2" not in ports):
                continue  # browsers and servers speak HTTP/2 over TLS only
            table = urls(scheme, ports["h2" if two else scheme], arguments.n)
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                json.dump(table, file)
                file.flush()
                got = measure(["transport", name, file.name], arguments.folder)
            if "missing" in got.result:
                print(f"| {name} | {scheme} | not installed | | |")
                continue
            assert got.result["ok"] == arguments.n, got.result
            rate, cpu = arguments.n / got.result["work_s"], 1e3 * got.result["cpu_s"] / arguments.n
            print(f"| {name} | {scheme} | {rate:.0f} | {cpu:.2f} | {got.peak_mb:.0f} |", flush=True)


PARTS = {"compare": part_compare, "faults": part_faults, "kills": part_kills, "transport": part_transport}


def main() -> None:
    """Parse, serve, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["compare", "faults", "kills", "transport"], default="compare")
    parser.add_argument("--n", type=int, default=5000, help="URLs")
    parser.add_argument("--repeats", type=int, default=3, help="of the faults part")
    parser.add_argument("--schemes", nargs="+", default=["http", "https"])
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--clients", nargs="+", default=["img2dataset", "ours"])
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "fetchbench", help="drawn pictures"
    )
    arguments = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}, load {os.getloadavg()[0]:.1f} at the start, n={arguments.n}\n")
    with server(arguments.folder) as ports:
        PARTS[arguments.part](arguments, ports)


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        name, path, mode, extra = sys.argv[2:]
        print(json.dumps(CLIENTS[name](json.loads(Path(path).read_text()), mode, json.loads(extra))))
    elif sys.argv[1:2] == ["kills"]:
        client_kills(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1:2] == ["transport"]:
        sys.path.insert(0, str(HERE.parent))
        import fetch_transports

        table = json.loads(Path(sys.argv[3]).read_text())
        start, cpu = time.perf_counter(), time.process_time()
        try:
            found = fetch_transports.LIBRARIES[sys.argv[2]](table)
            took, cpu = time.perf_counter() - start, time.process_time() - cpu
            print(json.dumps({"ok": found, "work_s": took, "cpu_s": cpu}))
        except ImportError as error:
            print(json.dumps({"missing": str(error)}))
    else:
        main()

"""Programs of others that write a chosen part of a pool as tars, each in an environment of its own.

DataComp's resharder is one file of its repository and in no package index; data-juicer pins versions that ours does
not have. So both are named on the command line, and left out where they are not.
"""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# What data-juicer does at the end of a Ray recipe. Ray's own start is told apart; CPU is of all its processes.
_DATA_JUICER = """
import json, sys, time
import psutil, ray
from data_juicer.core.ray_exporter import RayExporter

def cpu_s():
    spent = 0.0
    for one in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = one.cpu_times()
            spent += times.user + times.system + times.children_user + times.children_system
        except psutil.NoSuchProcess:
            pass
    return spent

source, target, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
wall, cpu = time.perf_counter(), cpu_s()
mapping = {"jpg": "image", "txt": "text", "json": ["uid", "url"]}
exporter = RayExporter(target, export_type="webdataset", field_mapping=mapping, min_rows_per_file=rows)
exporter.export(ray.data.read_json(source))
print(json.dumps({"wall_s": time.perf_counter() - wall, "cpu_s": cpu_s() - cpu}))
"""


def run_resharder(
    python: str, file: str, tars: Sequence[Path], sizes: Sequence[int], ids: Path, folder: Path, per_tar: int
) -> None:
    """Let DataComp's resharder, with one worker, write the samples whose uids `ids` lists, from tars below `folder`."""
    source, target = folder / "in", folder / "out"
    source.mkdir(parents=True)
    target.mkdir()
    for number, tar in enumerate(tars):
        (source / f"{number:08d}.tar").symlink_to(tar)
    names = [f"{number:08d}.tar" for number in range(len(tars))]
    (source / "sizes.json").write_text(json.dumps(dict(zip(names, sizes, strict=True))))
    command = [python, file, "-i", source, "-o", target, "-s", ids, "-j", "1", "--shard-size", str(per_tar)]
    subprocess.run([str(word) for word in command], check=True, stderr=subprocess.DEVNULL)


def run_data_juicer(python: str, rows: Path, target: Path, per_tar: int) -> Mapping[str, float]:
    """Let data-juicer's exporter write a JSONL of texts and paths of images; {wall_s, cpu_s} without Ray's start."""
    command = [python, "-c", _DATA_JUICER, str(rows), str(target), str(per_tar)]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: Mapping[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found

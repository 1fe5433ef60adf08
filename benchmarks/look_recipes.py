"""Three recipes on real images, to be looked at: what was kept and what was dropped, as contact sheets.

    python benchmarks/look_recipes.py --shared DIR --out DIR [--only coyo700m,webssl,lvd142m] [--engine inline]

The images of `<shared>/realdata` are served on 127.0.0.1 and run to a release with the configs as they stand, but for
models that are not at hand: CLIP is the demo's tiny one; OpenNSFW2 and the VLM are left out (the former's column is 0
in the source table, so that its rule keeps all); GantMan is the MobileNetV2 of `<shared>/reference`; SSCD and DINOv2
are Coral's MobileNet v1. LVD-142M's one seed set is the folder `text_heavy`. Writes <recipe>_<subset>.png, kept above
and dropped below with the number of the reason; the reasons are printed.
"""

import argparse
import csv
import http.server
import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from curate.config import load_recipe
from curate.demo.paths import weights_dir
from curate.engine.job import Job
from curate.rows import columns_of, read_rows
from curate.score.folder import score_folder
from pipelines import image_text, lvd142m

CONFIGS = Path(__file__).parents[1] / "configs"
THUMB, ACROSS, MOST = 96, 14, 112
ABSENT = ("nsfw_score_opennsfw2",)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """No log lines."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def table_of(shared: Path, address: str, out: Path) -> dict[str, Path]:
    """Write urls.parquet: every image with its caption; returns the files by URL."""
    folder = shared / "realdata"
    captions = {row["path"]: row["caption"] for row in csv.DictReader((folder / "captions.csv").open(encoding="utf-8"))}
    files = {f"{address}/{path.relative_to(folder)}": path for path in sorted(folder.glob("images/*/*"))}
    texts = [captions.get(str(path.relative_to(folder))) for path in files.values()]
    columns: dict[str, Any] = {"url": list(files), "text": texts, "dataset": pa.nulls(len(files), pa.string())}
    pq.write_table(pa.table(columns | {name: [0.0] * len(files) for name in ABSENT}), out / "urls.parquet")
    return files


def score_of(name: str, shared: Path) -> dict[str, Any]:
    """The recipe's entries that can run here."""
    mobile = next((shared / "reference/coral_mobilenet").glob("*extractor*.onnx"))
    stand_in = {"scorer": "onnx_embed", "weights": str(mobile), "width": 1024}
    yunet = shared / "reference/yunet/onnx__yunet_n_dynamic.onnx"
    real = {"text_stats", "text_facts", "text_count", "phash", "text_density"}
    score: dict[str, Any] = {}
    for entry, settings in load_recipe(CONFIGS / f"{name}.yaml").score.items():
        if settings["scorer"] in real:
            score[entry] = settings
        elif settings["scorer"] == "clip":
            score[entry] = {"scorer": "clip", "model": f"local-dir:{weights_dir()}"}
        elif settings["scorer"] == "faces":
            score[entry] = {"scorer": "faces", "weights": str(yunet)}
        elif settings["scorer"] == "gantman":
            weights = shared / "reference/nsfwjs_mobilenet_v2/nsfw_mobilenet_v2.derived.onnx"
            score[entry] = {"scorer": "gantman", "weights": str(weights)}
        elif entry in ("sscd", "dinov2"):
            score[entry] = stand_in
    return score


def run(name: str, shared: Path, out: Path, engine: str) -> Job:
    """Take one recipe to a release."""
    score = score_of(name, shared)
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    subsets = {
        word: one.model_dump(exclude_none=True)
        for word, one in recipe.subsets.items() if "p_yes" not in str(one.where)
    }  # fmt: skip
    changes = [
        f"root={out / name}", f"ingest.sources=[{out / 'urls.parquet'}]", f"engine={{driver: {engine}}}",
        "fetch.allow_networks=[127.0.0.1/32]", "fetch.timeout_s=60", f"score={json.dumps(score)}",
        f"subsets={json.dumps(subsets)}",
    ]  # fmt: skip
    if name == "lvd142m":
        seeds = out / "text_heavy.parquet"
        (out / "seeds.yaml").write_text(json.dumps({
            "root": "none", "ingest": {"sources": ["none"]}, "score": {"dinov2": score["dinov2"]}}))  # fmt: skip
        score_folder([shared / "realdata/images/text_heavy"], ["dinov2"], None, seeds,
                     load_recipe(out / "seeds.yaml").score)  # fmt: skip
        sets = [
            {"name": "near", "how": "sample", "embeddings": str(seeds), "k": 2},
            {"name": "cells", "how": "cluster", "embeddings": str(seeds), "more_than": 3},
        ]
        changes += [
            "dedup.1={by: embedding_sscd, form: dinov2, neighbours: 64, threshold: 0.9}",
            "cells.count=20", f"retrieve.sets={json.dumps(sets)}",
        ]  # fmt: skip
    job = Job(load_recipe(CONFIGS / f"{name}.yaml", changes))
    (lvd142m if name == "lvd142m" else image_text).run(job)
    job.note()
    job.close()
    return job


def sheet(job: Job, subset: str, files: dict[str, Path], path: Path) -> None:
    """Kept above, dropped below with the number of the reason; the reasons are printed."""
    columns = columns_of(list(job.tables.values()))
    names = ["url", f"member_{subset}", f"reason_{subset}"]
    rows = [row for shard in job.shards for row in read_rows(job.store, columns, names, shard.name).to_pylist()]
    kept = [row for row in rows if row[names[1]]]
    dropped = sorted((row for row in rows if not row[names[1]]), key=lambda row: row[names[2]])
    reasons = list(dict.fromkeys(row[names[2]] for row in dropped))
    print(f"{path.stem}: {len(kept)} kept, {len(dropped)} dropped")
    for number, reason in enumerate(reasons):
        print(f"  {number}: {sum(row[names[2]] == reason for row in dropped)} × {reason}")
    kept, dropped = kept[:: max(1, -(-len(kept) // MOST))], dropped[:: max(1, -(-len(dropped) // MOST))]
    lines = -(-len(kept) // ACROSS), -(-len(dropped) // ACROSS)
    canvas = Image.new("RGB", (ACROSS * THUMB, (sum(lines) + 1) * THUMB), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for first, group in ((0, kept), (lines[0] + 1, dropped)):
        for number, row in enumerate(group):
            x, y = number % ACROSS * THUMB, (first + number // ACROSS) * THUMB
            with Image.open(files[row["url"]]) as image:
                small = image.convert("RGB")
            small.thumbnail((THUMB - 4, THUMB - 4))
            canvas.paste(small, (x, y))
            if first:
                draw.rectangle((x, y, x + 22, y + 12), fill=(255, 255, 0))
                draw.text((x + 2, y), str(reasons.index(row[names[2]])), fill=(200, 0, 0))
    draw.text((8, lines[0] * THUMB + 30), f"^ kept {subset}      v dropped", fill=(0, 0, 0))
    canvas.save(path)


def main() -> None:
    """Run and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with realdata and reference")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="coyo700m,webssl,lvd142m")
    parser.add_argument("--engine", default="ray", choices=("ray", "inline"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shared = options.shared.resolve()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shared / "realdata")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files = table_of(shared, f"http://127.0.0.1:{server.server_address[1]}", options.out)
    for name in options.only.split(","):
        job = run(name, shared, options.out, options.engine)
        for subset in job.recipe.subsets:
            sheet(job, subset, files, options.out / f"{name}_{subset}.png")
    server.shutdown()


if __name__ == "__main__":
    main()

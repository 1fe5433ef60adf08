"""The score stage beside the bare work: decode and forward of the same models on the same batches, in one run.

    python benchmarks/bench_score.py                          ViT-B-32 (random weights), 256 drawn images, CPU
    python benchmarks/bench_score.py --with all --images DIR  every scorer whose weights are here, on real images
    python benchmarks/bench_score.py --device cuda --model ViT-L-14-quickgelu --count 4096

Bare is decode + forward: Pillow, and the same networks on inputs that lie ready (pHash and image facts, which have no
network, on decoded pixels). Preprocessing (resize, normalise, tokenize) is in neither; its column is for information.
`stage` is run_shard on a store: reading the tar, decoding, preprocessing, batching, the same networks, Arrow, Parquet.
CPU-seconds are of this process; rounds alternate and the least of each counts, since this machine is shared. Random
weights cost what trained ones cost.

Floor: stage <= 1.15 x bare in CPU-seconds on a CPU (`--assert-floor`); 0.9 of the bare rate on a GPU.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from curate.demo.canvas import KINDS
from curate.demo.drawing import draw, encoded
from curate.errors import CurateError
from curate.metrics import Cost, Stopwatch
from curate.schema import IMAGES_SCHEMA, KEY, SAMPLE_FIELDS, Shard, TableSpec, keys_of
from curate.score.decode import Picture, decode
from curate.score.entries import ENTRIES
from curate.score.registry import build
from curate.score.scorer import FeatureScorer, ImageScorer, Scorer
from curate.score.stage import device_of, score_stages
from curate.stage import run_shard
from curate.store import Store
from curate.tar import TarWriter

FLOOR = 1.15
LIGHT = ("phash", "image_facts", "faces", "text")


@dataclass(frozen=True)
class Work:
    """Images as stored, and a caption for each (every third repeats)."""

    images: list[bytes]
    texts: list[str]


def gather(folder: Path | None, count: int) -> Work:
    """`count` images of a folder (repeated when it has fewer), or drawn ones."""
    if folder is None:
        images = [encoded(draw(KINDS[seed % len(KINDS)], seed).image, "JPEG", 90) for seed in range(min(count, 256))]
    else:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
        images = [path.read_bytes() for path in files[:count]]
    images = [images[row % len(images)] for row in range(count)]
    return Work(images, [f"a picture of thing number {row - row % 3}" for row in range(count)])


def filled(root: Path, work: Work) -> tuple[Store, Shard, TableSpec, TableSpec]:
    """A store with these images in one shard, as fetch would leave it."""
    samples = TableSpec("samples", 1, _schema(SAMPLE_FIELDS))
    images = TableSpec("images", 1, IMAGES_SCHEMA, inputs={"samples": samples.fingerprint})
    store, shard = Store(str(root)), Shard("bench", len(work.images))
    urls = [f"http://127.0.0.1/{row}" for row in range(shard.rows)]
    keys = keys_of(urls, work.texts)
    import pyarrow as pa

    store.write(samples, shard, pa.table([keys, urls, work.texts], schema=samples.schema))
    tar, rows = store.shard_path(images, shard.name, ".tar"), []
    with store.staged(tar) as local, local.open("wb") as stream:
        writer = TarWriter(stream)
        for key, data in zip(keys, work.images, strict=True):
            found = decode(data)
            assert isinstance(found, Picture)
            place = {"tar": tar, "offset": writer.add(f"{key}.jpg", data), "length": len(data), "ext": "jpg"}
            size = {"width": found.image.width, "height": found.image.height}
            rows.append(dict.fromkeys(IMAGES_SCHEMA.names) | {KEY.name: key, "status": "ok", **place, **size})
        writer.finish()
    store.write(images, shard, pa.Table.from_pylist(rows, schema=images.schema), aligned_with=samples)
    return store, shard, samples, images


def _schema(fields: Sequence[Any]) -> Any:
    import pyarrow as pa

    return pa.schema(fields)


def random_clip(folder: Path, name: str) -> str:
    """A published architecture with random weights, as a `local-dir:` model."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    if name == "demo":
        return f"local-dir:{Path(__file__).parents[1] / 'curate' / 'demo' / 'weights'}"
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    model = open_clip.create_model(name)
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return f"local-dir:{folder}"


def timed(call: Callable[[], object], device: str) -> Cost:
    """What one call costs."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    with Stopwatch() as watch:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    return watch.cost


class Bare:
    """Decode, and what the scorers compute on inputs that lie ready; nothing else."""

    def __init__(self, scorers: Sequence[Scorer], work: Work) -> None:
        self.work = work
        self.images = [scorer for scorer in scorers if isinstance(scorer, ImageScorer)]
        self.heads = [scorer for scorer in scorers if isinstance(scorer, FeatureScorer)]
        for scorer in scorers:
            scorer.load(device_of(scorer))
        self.pictures: list[Picture] = []
        self.ready: dict[str, list[Any]] = {}

    def decode(self) -> None:
        """Every image once, to RGB pixels."""
        self.pictures = [found for found in map(decode, self.work.images) if isinstance(found, Picture)]
        for picture in self.pictures:
            picture.pixels  # noqa: B018  # the conversion is the work

    def prepare(self) -> None:
        """Preprocessing of decoded images for the networks: part of the stage, and of no bare figure."""
        pairs = list(zip(self.pictures, self.work.texts, strict=True))
        self.ready = {scorer.name: [scorer.prepare(*pair) for pair in pairs] for scorer in self.networks}

    @property
    def networks(self) -> list[ImageScorer[Any]]:
        """Scorers that run a network."""
        return [scorer for scorer in self.images if scorer.how is not None]

    def forward(self) -> None:
        """The networks in their own batches, texts once each; pHash and image facts, which have none, on pixels."""
        for scorer in self.images:
            scorer.begin()
            if scorer.how is None:
                for picture in self.pictures:
                    scorer.prepare(picture, None)
                continue
            ready = self.ready[scorer.name]
            for start in range(0, len(ready), scorer.batch_size):
                columns = scorer.score(ready[start : start + scorer.batch_size])
                for head in self.heads:
                    if head.source == scorer.name:
                        head.score(np.asarray(columns[f"{scorer.name}_image"], dtype=np.float32))


def least(costs: Sequence[Cost]) -> Cost:
    """The least wall and CPU time of the rounds."""
    return Cost(min(c.wall_s for c in costs), min(c.cpu_s for c in costs), max(c.peak_rss_mb for c in costs))


def measure(section: dict[str, dict[str, Any]], work: Work, rounds: int, device: str) -> dict[str, Cost]:
    """Decode, forward, preprocessing and the stage, alternating."""
    costs: dict[str, list[Cost]] = {"decode": [], "forward": [], "prepare": [], "stage": []}
    with tempfile.TemporaryDirectory(prefix="curate-bench-") as folder:
        store, shard, samples, images = filled(Path(folder), work)
        bare = Bare(build(section), work)
        (stage,) = score_stages(section, samples, images)
        stage.setup()
        for number in range(rounds + 1):  # the first warms up
            found = {
                "decode": timed(bare.decode, device),
                "prepare": timed(bare.prepare, device),
                "forward": timed(bare.forward, device),
                "stage": timed(lambda: run_shard(store, stage, shard), device),
            }
            for spec in stage.tables:
                store.remove(store.shard_path(spec, shard.name))
            for name, cost in found.items():
                costs[name] += [cost] * (number > 0)
    return {name: least(found) for name, found in costs.items()}


def plain_loop(work: Work, batch: int) -> None:
    """The loop that a person writes with `transformers` (random ViT-B/32): processor, model, cosine."""
    import torch
    from PIL import Image
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    model = plain_loop.__dict__.setdefault("model", CLIPModel(CLIPConfig()).eval())
    processor = plain_loop.__dict__.setdefault("processor", CLIPImageProcessor())
    import io

    for start in range(0, len(work.images), batch):
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in work.images[start : start + batch]]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        tokens = torch.full((len(images), 77), 320)
        with torch.inference_mode():
            model(pixel_values=pixels, input_ids=tokens)


def modes(work: Work, model: str) -> None:
    """Print how far the two preprocessings lie apart: pixels, image embeddings, similarities."""
    found: dict[str, dict[str, Any]] = {}
    for mode in ("exact", "fast"):
        (scorer,) = build({"clip_bench": {"scorer": "clip", "model": model, "preprocess": mode}})
        assert isinstance(scorer, ImageScorer)
        scorer.load(device_of(scorer))
        pictures = [item for item in map(decode, work.images) if isinstance(item, Picture)]
        prepared = [scorer.prepare(*pair) for pair in zip(pictures, work.texts, strict=True)]
        parts = [scorer.score(prepared[start : start + 32]) for start in range(0, len(prepared), 32)]
        found[mode] = {name: np.concatenate([np.stack(part[name]) for part in parts]) for name in parts[0]}
    exact, fast = found["exact"], found["fast"]
    cosine = (exact["clip_bench_image"] * fast["clip_bench_image"]).sum(axis=1)
    apart = np.abs(exact["clip_similarity_bench"] - fast["clip_similarity_bench"])
    spread = float(np.std(exact["clip_similarity_bench"]))
    print("| images | cosine of the two embeddings, least / mean | similarity apart, mean / greatest | its spread |")
    print("|---|---|---|---|")
    near = f"{cosine.min():.6f} / {cosine.mean():.6f}"
    print(f"| {len(cosine)} | {near} | {apart.mean():.6f} / {apart.max():.6f} | {spread:.4f} |")


def pixel_modes(work: Work) -> None:
    """Print how far apart the network's pixels lie, in levels of 255, for the transforms that scorers use."""
    from torchvision import transforms

    from curate.score.pixels import Pixels

    end = [transforms.ToTensor(), transforms.Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))]
    cubic = transforms.InterpolationMode.BICUBIC
    kinds = {
        "clip: bicubic, shorter side 224, crop": [transforms.Resize(224, cubic), transforms.CenterCrop(224)],
        "SSCD: bilinear, 320 x 320": [transforms.Resize((320, 320))],
        "timm, DINOv2: bicubic, shorter side 256, crop 224": [
            transforms.Resize(256, cubic),
            transforms.CenterCrop(224),
        ],
    }
    print("\n| transform | mean | 99th percentile | greatest |\n|---|---|---|---|")
    for title, steps in kinds.items():
        pixels, apart = Pixels(transforms.Compose([*steps, *end]), "cpu"), []
        for data in work.images:
            found = decode(data)
            assert isinstance(found, Picture)
            exact = pixels.batch([pixels.resized(found.rgb)], "exact")
            apart.append((255 * (exact - pixels.batch([found.pixels], "fast")).abs()).numpy().ravel())
        levels = np.concatenate(apart)
        print(f"| {title} | {levels.mean():.3f} | {np.quantile(levels, 0.99):.0f} | {levels.max():.0f} |")


def sections(names: Sequence[str], model: str, device: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Title to `score:` section: each scorer alone, then all together."""
    clip = {"clip_bench": {"scorer": "clip", "model": model, "device": device}}
    alone: dict[str, dict[str, dict[str, Any]]] = {"clip": clip}
    for name in names:
        entry = {name: dict(ENTRIES[name])}
        try:
            (scorer,) = build(entry)
            scorer.check()
        except CurateError as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
            continue
        alone[name] = entry
    if len(alone) > 1:
        alone["all together"] = {name: entry for section in alone.values() for name, entry in section.items()}
    return alone


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images (default: drawn)")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture, or `demo`")
    parser.add_argument("--with", dest="names", default="", help=f"ready-made entries; `all`: {', '.join(LIGHT)}")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="a plain transformers loop beside it (ViT-B/32 only)")
    parser.add_argument("--modes", action="store_true", help="how far `fast` preprocessing is from `exact`; no timing")
    parser.add_argument("--assert-floor", action="store_true")
    settings = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    work = gather(settings.images, settings.count)
    names = LIGHT if settings.names == "all" else [name for name in settings.names.split(",") if name]
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="curate-bench-clip-") as folder:
        model = random_clip(Path(folder) / "clip", settings.model)
        print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {settings.count} images, "
              f"{settings.model}, device {settings.device}, CPU-seconds, {time.strftime('%Y-%m-%d')}\n")  # fmt: skip
        if settings.modes:
            modes(work, model)
            pixel_modes(work)
            return
        print("| scorers | decode | forward | preprocessing | stage | stage / bare | stage img/s | peak MB |")
        print("|---|---|---|---|---|---|---|---|")
        for title, section in sections(names, model, settings.device).items():
            costs = measure(section, work, settings.rounds, settings.device)
            ratios[title] = costs["stage"].cpu_s / (costs["decode"].cpu_s + costs["forward"].cpu_s)
            cpu = " | ".join(f"{costs[name].cpu_s:.2f}" for name in ("decode", "forward", "prepare", "stage"))
            rate = settings.count / costs["stage"].wall_s
            print(
                f"| {title} | {cpu} | {ratios[title]:.3f} | {rate:.1f} | {costs['stage'].peak_rss_mb:.0f} |", flush=True
            )
    if settings.peer:
        import torch

        torch.set_num_threads(1)
        plain_loop(work, 32)
        cost = least([timed(lambda: plain_loop(work, 32), "cpu") for _ in range(settings.rounds)])
        rate = settings.count / cost.wall_s
        print(
            f"| plain transformers loop, ViT-B/32 | | | | {cost.cpu_s:.2f} | | | {rate:.1f} | {cost.peak_rss_mb:.0f} |"
        )
    over = {title: round(ratio, 3) for title, ratio in ratios.items() if ratio > FLOOR}
    if settings.assert_floor and over:
        raise SystemExit(f"the stage costs more than {FLOOR} x the bare work: {over}")


if __name__ == "__main__":
    main()

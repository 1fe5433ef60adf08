"""The score stage beside the bare work: decode and forward of the same models on the same batches, in one run.

    python benchmarks/bench_score.py                          ViT-B-32 (random weights), 256 drawn images, CPU
    python benchmarks/bench_score.py --with all --images DIR  every scorer whose weights are here, on real images
    python benchmarks/bench_score.py --device cuda --model ViT-L-14-quickgelu --with gpu --count 4096

`--with gpu`: OpenNSFW2, watermark and SSCD (random weights), pHash, faces and text beside CLIP. On a GPU the columns
are wall seconds, and the last ratio is bare forward / stage, where CLIP's bare is of tensors that lie on the device.

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
from curate.score.clip import ClipScorer
from curate.score.decode import Picture, decode
from curate.score.device import gpu_present
from curate.score.entries import ENTRIES
from curate.score.registry import build
from curate.score.scorer import FeatureScorer, ImageScorer, Scorer
from curate.score.stage import device_of, score_stages
from curate.stage import run_shard
from curate.store import Store
from curate.tar import TarWriter

FLOOR = 1.15
GPU_FLOOR = 0.9
LIGHT = ("phash", "image_facts", "faces", "text")
HEAVY = ("opennsfw2", "watermark", "sscd")


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


def random_weights(name: str, folder: Path) -> Path:
    """Random weights of a published network, in the form that its scorer reads."""
    import h5py
    import torch
    from torchvision.models import resnet50

    from curate.score.opennsfw2 import OpenNsfwNet
    from curate.score.watermark import build_net

    torch.manual_seed(0)
    file = folder / name
    if name == "sscd":
        torch.jit.script(resnet50(num_classes=512).eval()).save(str(file))
    elif name == "watermark":
        torch.save(build_net().state_dict(), file)
    else:
        with h5py.File(file, "w") as stream:
            for layer, part in OpenNsfwNet().keras_layers():
                kinds = ("gamma", "beta", "moving_mean", "moving_variance")
                if not isinstance(part, torch.nn.BatchNorm2d):
                    kinds = ("kernel", "bias")
                for kind, value in zip(kinds, part.state_dict().values(), strict=False):
                    turned = value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T if value.ndim == 2 else value
                    stream.create_dataset(f"{layer}/{layer}/{kind}:0", data=turned.numpy())
    return file


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
        self.there: dict[str, list[Any]] = {}

    def decode(self) -> None:
        """Every image once, to RGB pixels."""
        self.pictures = [found for found in map(decode, self.work.images) if isinstance(found, Picture)]
        for picture in self.pictures:
            picture.pixels  # noqa: B018  # the conversion is the work

    def prepare(self) -> None:
        """Preprocessing of decoded images for the networks: part of the stage, and of no bare figure."""
        pairs = list(zip(self.pictures, self.work.texts, strict=True))
        self.ready = {scorer.name: [scorer.prepare(*pair) for pair in pairs] for scorer in self.networks}
        self.there = {scorer.name: self._on_device(scorer) for scorer in self.networks if self._is_clip_on_gpu(scorer)}

    @staticmethod
    def _is_clip_on_gpu(scorer: Scorer) -> bool:
        return isinstance(scorer, ClipScorer) and device_of(scorer).name == "cuda"

    def _on_device(self, scorer: Any) -> list[Any]:
        pixels = [pair.pixels for pair in self.ready[scorer.name]]
        return [scorer.model.pixels.batch(pixels[at : at + 256], "exact") for at in range(0, len(pixels), 256)]

    def _clip_forward(self, scorer: Any) -> None:
        """The towers on tensors that lie on the device, and each distinct text once."""
        import torch

        model = scorer.model
        with torch.inference_mode(), model._autocast():
            for batch in self.there[scorer.name]:
                model._model.encode_image(batch)
        tokens = {pair.text: pair.tokens for pair in self.ready[scorer.name]}
        model.embed_texts(np.stack([model.tokens(text) if found is None else found for text, found in tokens.items()]))

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
            if scorer.name in self.there:
                self._clip_forward(scorer)
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


def sections(names: Sequence[str], model: str, device: str, folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Title to `score:` section: each scorer alone, then all together."""
    clip = {"clip_bench": {"scorer": "clip", "model": model, "device": device}}
    alone: dict[str, dict[str, dict[str, Any]]] = {"clip": clip}
    for name in names:
        entry = {name: dict(ENTRIES[name])}
        if name in HEAVY:
            entry[name] |= {"weights": str(random_weights(name, folder)), "device": device}
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
    parser.add_argument("--with", dest="names", default="", help=f"ready-made entries; all: {', '.join(LIGHT)}; or gpu")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--assert-floor", action="store_true")
    settings = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    work = gather(settings.images, settings.count)
    groups = {"all": LIGHT, "gpu": ("phash", *HEAVY, "faces", "text")}
    names = groups.get(settings.names) or [name for name in settings.names.split(",") if name]
    unknown = sorted({*names} - {*ENTRIES})
    if unknown:
        parser.error(f"--with {unknown[0]}: expected of {', '.join(ENTRIES)}; clip always runs")
    ratios: dict[str, float] = {}
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and gpu_present())
    with tempfile.TemporaryDirectory(prefix="curate-bench-clip-") as folder:
        model = random_clip(Path(folder) / "clip", settings.model)
        print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {settings.count} images, "
              f"{settings.model}, device {settings.device}, {'wall' if on_gpu else 'CPU'}-seconds, "
              f"{time.strftime('%Y-%m-%d')}\n")  # fmt: skip
        ratio = "bare forward / stage" if on_gpu else "stage / bare"
        print(f"| scorers | decode | forward | preprocessing | stage | {ratio} | stage img/s | peak MB |")
        print("|---|---|---|---|---|---|---|---|")
        for title, section in sections(names, model, settings.device, Path(folder)).items():
            costs = measure(section, work, settings.rounds, settings.device)
            spent = {name: cost.wall_s if on_gpu else cost.cpu_s for name, cost in costs.items()}
            bare = spent["forward"] + (0 if on_gpu else spent["decode"])
            ratios[title] = bare / spent["stage"] if on_gpu else spent["stage"] / bare
            columns = " | ".join(f"{spent[name]:.2f}" for name in ("decode", "forward", "prepare", "stage"))
            rate, peak = settings.count / costs["stage"].wall_s, costs["stage"].peak_rss_mb
            print(f"| {title} | {columns} | {ratios[title]:.3f} | {rate:.1f} | {peak:.0f} |", flush=True)
    beyond = {t: round(ratio, 3) for t, ratio in ratios.items() if (ratio < GPU_FLOOR if on_gpu else ratio > FLOOR)}
    if settings.assert_floor and beyond:
        raise SystemExit(f"beyond the floor ({GPU_FLOOR if on_gpu else FLOOR}): {beyond}")


if __name__ == "__main__":
    main()

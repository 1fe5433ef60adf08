"""CPU milliseconds a row of every model and step that a recipe names: the numbers of curate/report/rates.yaml.

    python benchmarks/bench_rates.py [--images DIR] [--only NAME,…]

Networks are built with random weights, which cost what trained ones cost, and timed as the score stage runs them on a
CPU: one thread, float32, forward alone. Scorers that need no download run through the score stage itself, decoding
included; `faces` needs YuNet's file (CURATE_WEIGHTS names its folder). CPU-seconds are of this process, the least of
three rounds, since this machine may be shared. Prints one YAML line each; a GPU, where there is one, is not looked at.
About four minutes.
"""

import argparse
import datetime
import io
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from curate.demo.drawing import draw
from curate.errors import WeightsError
from curate.metrics import Stopwatch, progress
from curate.schema import IMAGES_SCHEMA, KEY, SAMPLE_FIELDS, Shard, TableSpec, keys_of
from curate.score.pool_counts import pool_count_steps
from curate.score.stage import score_stages
from curate.stage import run_shard
from curate.store import Store
from curate.tar import TarWriter

ROUNDS = 3
BATCH = 8
SIDE = 512  # pixels, the larger side of what most recipes store
KINDS = ("shapes", "scene", "document", "chart", "sign")
SCORERS: dict[str, dict[str, Any]] = {
    "phash": {}, "text_stats": {}, "text_facts": {}, "image_facts": {}, "faces": {}, "text_density": {},
}  # fmt: skip

Forward = Callable[[], object]


def clip(name: str) -> Forward:
    """Both towers of an open_clip model."""
    import open_clip

    model = open_clip.create_model(name, pretrained=None).eval()
    side = model.visual.image_size
    pixels = torch.zeros(BATCH, 3, *(side if isinstance(side, tuple) else (side, side)))
    tokens = torch.randint(0, 49000, (BATCH, model.context_length))
    return lambda: (model.encode_image(pixels), model.encode_text(tokens))


def vision(name: str, side: int, **settings: Any) -> Forward:
    """A timm network."""
    import timm

    model = timm.create_model(name, pretrained=False, **settings).eval()
    pixels = torch.zeros(BATCH, 3, side, side)
    return lambda: model(pixels)


def toxic() -> Forward:
    """XLM-RoBERTa base, 64 tokens."""
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    config = XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, num_labels=16)
    model = XLMRobertaForSequenceClassification(config).eval()
    tokens = torch.randint(5, 250000, (BATCH, 64))
    return lambda: model(tokens)


def simcse() -> Forward:
    """BERT base, 64 tokens."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig()).eval()
    tokens = torch.randint(1000, 30000, (BATCH, 64))
    return lambda: model(tokens)


def head() -> Forward:
    """An aesthetic or NSFW head on ViT-L/14 features."""
    sizes = (768, 1024, 128, 64, 16, 1)
    model = torch.nn.Sequential(*(torch.nn.Linear(one, two) for one, two in pairwise(sizes)))
    features = torch.zeros(BATCH, 768)
    return lambda: model(features)


NETWORKS: dict[str, Callable[[], Forward]] = {
    "clip ViT-B-32": lambda: clip("ViT-B-32-quickgelu"),
    "clip ViT-B-16": lambda: clip("ViT-B-16-quickgelu"),
    "clip ViT-L-14": lambda: clip("ViT-L-14-quickgelu"),
    "dinov2-base": lambda: vision("vit_base_patch14_dinov2", 224, img_size=224, num_classes=0),
    "sscd": lambda: vision("resnet50", 320),
    "opennsfw2": lambda: vision("resnet50", 224),
    "gantman": lambda: vision("mobilenetv2_140", 224),
    "watermark": lambda: vision("efficientnet_b3", 256),
    "isc_ft_v107": lambda: vision("tf_efficientnetv2_m", 512, num_classes=256),
    "toxic": toxic,
    "simcse": simcse,
    "head": head,
}


def least_ms(forward: Forward) -> float:
    """CPU milliseconds for one of a batch, the least of the rounds."""
    found = []
    with torch.inference_mode():
        forward()
        for _ in range(ROUNDS):
            start, times = time.process_time(), 0
            while time.process_time() - start < 1.0:
                forward()
                times += 1
            found.append((time.process_time() - start) / (times * BATCH))
    return 1000 * min(found)


def images_of(folder: Path | None, count: int) -> Iterator[bytes]:
    """Files of a folder, or drawings, as JPEG of at most 512 pixels."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".png")) if folder else []
    for number in range(count):
        if files:
            image = Image.open(files[number * len(files) // count]).convert("RGB")
        else:
            image = draw(KINDS[number % len(KINDS)], number).image
        image.thumbnail((SIDE, SIDE))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=95)
        yield out.getvalue()


def filled(root: Path, images: list[bytes], rows_of_text: int) -> tuple[Store, Shard, TableSpec, TableSpec]:
    """A store with one shard of these images as fetch would leave it, or of so many texts without images."""
    samples = TableSpec("samples", 1, pa.schema(SAMPLE_FIELDS))
    spec = TableSpec("images", 1, IMAGES_SCHEMA, inputs={"samples": samples.fingerprint})
    store, shard = Store(str(root)), Shard("bench", rows_of_text or len(images))
    urls = [f"http://127.0.0.1/{row}" for row in range(shard.rows)]
    texts = [f"a picture of thing number {row} on a table in the old house" for row in range(shard.rows)]
    keys = keys_of(urls, texts)
    store.write(samples, shard, pa.table([keys, urls, texts], schema=samples.schema))
    if rows_of_text:
        return store, shard, samples, spec
    tar, rows = store.shard_path(spec, shard.name, ".tar"), []
    with store.staged(tar) as local, local.open("wb") as stream:
        writer = TarWriter(stream)
        for key, data in zip(keys, images, strict=True):
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
            place = {"tar": tar, "offset": writer.add(f"{key}.jpg", data), "length": len(data)}
            facts = {"status": "ok", "ext": "jpg", "width": width, "height": height, **place}
            rows.append(dict.fromkeys(IMAGES_SCHEMA.names) | {KEY.name: key} | facts)
        writer.finish()
    store.write(spec, shard, pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA), aligned_with=samples)
    return store, shard, samples, spec


def scorer_ms(kind: str, entry: dict[str, Any], images: list[bytes]) -> float:
    """CPU milliseconds a row of one scorer through its stage, decoding included; loading is left out."""
    found = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            store, shard, samples, spec = filled(
                Path(folder), images, 20_000 if kind.startswith("text_") and kind != "text_density" else 0
            )
            (stage,) = score_stages({"one": {"scorer": kind, **entry}}, samples, spec)
            stage.check(store)
            stage.setup()
            with Stopwatch() as watch:
                run_shard(store, stage, shard)
            stage.teardown()
            found.append(watch.cost.cpu_s / shard.rows)
    return 1000 * min(found)


def count_ms(kind: str, rows: int) -> float:
    """CPU milliseconds a row of a step that brings equal values together across shards."""
    samples = TableSpec("samples", 1, pa.schema(SAMPLE_FIELDS))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store, shards = Store(folder), [Shard(f"{at:04d}", 10_000) for at in range(rows // 10_000)]
        for shard in shards:
            urls = [f"http://example.org/{shard.name}/{row}.jpg" for row in range(shard.rows)]
            words = rng.integers(0, 50_000, (shard.rows, 9))
            texts = [" ".join(f"w{word}" for word in line) for line in words.tolist()]
            store.write(samples, shard, pa.table([keys_of(urls, texts), urls, texts], schema=samples.schema))
        (step,) = pool_count_steps({"one": {"scorer": kind}}, samples, shards)
        with Stopwatch() as watch, progress(kind, len(shards)) as ticker:
            step.run(store, shards, map, ticker)
    return 1000 * watch.cost.cpu_s / rows


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of real images; without it, drawings")
    parser.add_argument("--only", default="", help="names, with commas between")
    options = parser.parse_args()
    torch.set_num_threads(1)
    only = set(options.only.split(",")) - {""}
    print(f"# {datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}")
    images = list(images_of(options.images, 64))
    print(f"# {len(images)} images of {sum(map(len, images)) / len(images) / 1000:.1f} kB")
    for name, make in NETWORKS.items():
        if not only or name in only:
            print(f"  {name}: {least_ms(make()):.3g}", flush=True)
    for kind, entry in SCORERS.items():
        if not only or kind in only:
            try:
                print(f"  {kind}: {scorer_ms(kind, entry, images):.3g}", flush=True)
            except WeightsError as error:
                print(f"  # {kind}: {error}", flush=True)
    for kind in ("url_count", "rare_words"):
        if not only or kind in only:
            print(f"  {kind}: {count_ms(kind, 200_000):.3g}", flush=True)


if __name__ == "__main__":
    main()

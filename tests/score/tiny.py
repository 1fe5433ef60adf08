"""Small real things for score tests: a random open_clip model on disk, drawn images, a scored store."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import save_file

from curate.schema import IMAGES_SCHEMA, KEY, SAMPLE_FIELDS, Shard, TableSpec, keys_of
from curate.store import Store
from curate.tar import TarWriter

WIDTH = 24


def tiny_clip(folder: Path, *, seed: int = 0, sigmoid: bool = False, context: int = 16) -> Path:
    """A random CLIP of open_clip's own architecture (32 px, 24-d) with its configuration, as `local-dir:` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": context, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    if sigmoid:
        config |= {"init_logit_bias": -10, "init_logit_scale": 2.3}
    torch.manual_seed(seed)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def picture(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A smooth random RGB image."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    """The image as a file."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


SAMPLES = TableSpec("samples", 1, pa.schema(SAMPLE_FIELDS))
IMAGES = TableSpec("images", 1, IMAGES_SCHEMA, inputs={"samples": SAMPLES.fingerprint})


def filled(
    root: Path, images: Sequence[bytes | None], texts: Sequence[str | None], shard: str = "s-0"
) -> tuple[Store, Shard]:
    """A store with one shard of samples and images; None is a failed download."""
    store, place = Store(str(root)), Shard(shard, len(images))
    urls = [f"http://127.0.0.1/{shard}/{row}" for row in range(len(images))]
    keys = keys_of(urls, texts)
    store.write(SAMPLES, place, pa.table([keys, urls, list(texts)], schema=SAMPLES.schema))
    rows = []
    tar = store.shard_path(IMAGES, shard, ".tar")
    with store.staged(tar) as local, local.open("wb") as stream:
        writer = TarWriter(stream)
        for key, data in zip(keys, images, strict=True):
            row = dict.fromkeys(IMAGES_SCHEMA.names) | {KEY.name: key, "status": "timeout"}
            if data is not None:
                offset = writer.add(f"{key}.jpg", data)
                row |= {"status": "ok", "ext": "jpg", "tar": tar, "offset": offset, "length": len(data)}
                row |= {"width": 60, "height": 40}
            rows.append(row)
        writer.finish()
    store.write(IMAGES, place, pa.Table.from_pylist(rows, schema=IMAGES.schema), aligned_with=SAMPLES)
    return store, place

"""A small pool as fetch and score leave it: JPEG and PNG bytes in tars, scores with nulls, failures among the rows."""

import hashlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from curate.config import Recipe, SubsetSettings, parse_recipe
from curate.emit.step import EmitStep, emit_step
from curate.engine.inline import InlineDriver
from curate.metrics import progress
from curate.schema import IMAGES_SCHEMA, KEY, SAMPLE_FIELDS, Shard, TableSpec, inputs_of, keys_of
from curate.select.step import select_stage, threshold_step
from curate.store import Store
from curate.tar import TarWriter

SAMPLES = TableSpec("samples", 1, pa.schema([*SAMPLE_FIELDS, pa.field("width", pa.int64())]), open_schema=True)
IMAGES = TableSpec("images", 1, IMAGES_SCHEMA, inputs=inputs_of([SAMPLES]), with_images=True)
SCORES = TableSpec(
    "scores_toy", 1,
    pa.schema([KEY, pa.field("score", pa.float32()), pa.field("word_count", pa.int32()),
               pa.field("boxes", pa.list_(pa.list_(pa.float32())))]),
    inputs=inputs_of([IMAGES]),
)  # fmt: skip
EMBEDDINGS = TableSpec(
    "embeddings_toy", 1, pa.schema([KEY, pa.field("toy_image", pa.list_(pa.float16(), 4))]), inputs=inputs_of([IMAGES])
)
TABLES = [SAMPLES, IMAGES, SCORES, EMBEDDINGS]


def make_pool(
    store: Store, shards: int = 6, rows: int = 60, seed: int = 3, image: bool = True, site: str = ""
) -> list[Shard]:
    """Commit the tables of a pool; a tenth of the rows failed, some have no caption, some no score.

    Row r of shard s has the URL `<site>/<s>/<r>` and the hash of its bytes where a site is named; else made-up ones.
    """
    draw = random.Random(seed)
    pool = []
    for number in range(shards):
        shard = Shard(f"pool-{number:04d}", rows)
        urls = [f"{site}/{number}/{row}" if site else f"https://host-{number}.example/{row}.jpg" for row in range(rows)]
        texts = [None if draw.random() < 0.1 else f"caption {number} {row} – ünï" for row in range(rows)]
        keys = keys_of(urls, texts)
        oks = [draw.random() > 0.1 for _ in keys]
        with store.staged(store.shard_path(IMAGES, shard.name, ".tar")) as local, local.open("wb") as stream:
            tar = TarWriter(stream)
            places: list[tuple[int | None, int | None]] = []
            sums = [f"{row:064x}" for row in range(rows)]
            for row, (key, ok) in enumerate(zip(keys, oks, strict=True)):
                if not ok:
                    places.append((None, None))
                    continue
                data = stored(number, row, rows) if image else draw.randbytes(2000)
                sums[row] = hashlib.sha256(data).hexdigest() if site else sums[row]
                places.append((tar.add(f"{key}.{'png' if row % 7 == 3 else 'jpg'}", data), len(data)))
                tar.add(f"{key}.json", b"{}")
            tar.finish()
        path = store.shard_path(IMAGES, shard.name, ".tar")
        images = [
            {"key": key, "status": "ok" if ok else "timeout", "ext": ("png" if row % 7 == 3 else "jpg") if ok else None,
             "width": 24 if ok else None, "height": 16 if ok else None, "sha256": sums[row] if ok else None,
             "tar": path if ok else None, "offset": place[0], "length": place[1]}
            for row, (key, ok, place) in enumerate(zip(keys, oks, places, strict=True))
        ]  # fmt: skip
        scores = [
            {"key": key, "score": draw.random() if ok and draw.random() > 0.05 else None, "word_count": row % 9,
             "boxes": [[0.1, 0.2, 0.3, float("nan")]] if row % 5 == 0 else []}
            for row, (key, ok) in enumerate(zip(keys, oks, strict=True))
        ]  # fmt: skip
        vectors = [{"key": key, "toy_image": [1.0, 0.5, 0.25, row] if ok else None} for row, (key, ok) in
                   enumerate(zip(keys, oks, strict=True))]  # fmt: skip
        widths = pa.array([100 + row for row in range(rows)], pa.int64())
        store.write(SAMPLES, shard, pa.table([keys, urls, texts, widths], schema=SAMPLES.schema))
        for spec, facts in ((IMAGES, images), (SCORES, scores), (EMBEDDINGS, vectors)):
            store.write(spec, shard, pa.Table.from_pylist(facts, schema=spec.schema), SAMPLES)
        pool.append(shard)
    names = [{"name": shard.name, "rows": shard.rows} for shard in pool]
    store.add_batch(SAMPLES, 0, {"shards": names, "sources": ["urls.parquet"], "counts": {"rows_in": shards * rows}})
    return pool


def stored(shard: int, row: int, rows: int) -> bytes:
    """The picture of a row, PNG now and then."""
    return picture(shard * rows + row, "PNG" if row % 7 == 3 else "JPEG")


def picture(seed: int, kind: str) -> bytes:
    """A small picture, different for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def recipe_with(subsets: dict[str, Any], **emit: Any) -> Recipe:
    """A recipe that emits these subsets."""
    return parse_recipe({"root": "x", "ingest": {"sources": ["a"]}, "subsets": subsets, "emit": emit})


def selected(store: Store, shards: Sequence[Shard], recipe: Recipe) -> tuple[dict[str, TableSpec], dict[str, float]]:
    """Run selection; returns the member tables and thresholds."""
    subsets: dict[str, SubsetSettings] = recipe.subsets
    step = threshold_step(subsets, TABLES, shards)
    if not step.done(store, shards):
        with progress("thresholds", len(shards)) as ticker:
            step.run(store, shards, map, ticker)
    thresholds = step.values(store)
    assert thresholds is not None
    stage = select_stage(subsets, TABLES, shards, thresholds)
    stage.check(store)
    for reports in InlineDriver().run(store, [stage], shards):
        assert reports[0].set_aside is None
    return dict(zip(subsets, stage.tables, strict=True)), thresholds


def emitter(store: Store, shards: Sequence[Shard], recipe: Recipe) -> EmitStep:
    """The step, after selection."""
    members, thresholds = selected(store, shards, recipe)
    return emit_step(recipe.emit, recipe, TABLES, members, shards, thresholds, {})


def run(step: EmitStep, store: Store, shards: Sequence[Shard], map_items: Any = map) -> dict[str, int]:
    """Run a step with a map of the caller's choice."""
    with progress("emit", len(shards)) as ticker:
        return dict(step.run(store, shards, map_items, ticker))


def shuffled_map(seed: int) -> Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]:
    """A map that takes its items in some other order."""

    def map_items(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        order = list(items)
        random.Random(seed + len(order)).shuffle(order)
        return map(function, order)

    return map_items

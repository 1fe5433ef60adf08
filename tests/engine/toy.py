"""A pool of made-up rows and two small stages: real stages in every respect but their work."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from curate.schema import IMAGE, IMAGE_FIELDS, IMAGES_SCHEMA, KEY, SAMPLE_FIELDS, Shard, TableSpec, inputs_of, keys_of
from curate.stage import Read, Resources, Stage, Task
from curate.store import Store

SAMPLES = TableSpec("samples", 1, pa.schema(SAMPLE_FIELDS), open_schema=True)


def fill_pool(store: Store, shards: int = 4, rows: int = 600) -> list[Shard]:
    """Commit samples."""
    pool = []
    for number in range(shards):
        urls = [f"http://127.0.0.1/{number}/{row}.jpg" for row in range(rows)]
        texts = [f"caption {row}" if row % 7 else None for row in range(rows)]
        shard = Shard(f"{number:04d}", rows)
        store.write(SAMPLES, shard, pa.table([keys_of(urls, texts), urls, texts], schema=pa.schema(SAMPLE_FIELDS)))
        pool.append(shard)
    store.add_batch(SAMPLES, 0, {"shards": [{"name": shard.name, "rows": shard.rows} for shard in pool]})
    return pool


class ToyFetch(Stage):
    """Gives the URL's own bytes as the image; every fifth row failed. `poison` kills the process on one shard."""

    name = "fetch"
    resources = Resources(cpus=0.5)
    tables = (TableSpec("images", 1, IMAGES_SCHEMA, inputs=inputs_of([SAMPLES]), with_images=True),)

    def __init__(self, poison: str = "", die_once: Path | None = None, raises: str = "", nap_s: float = 0.0) -> None:
        super().__init__()
        self.poison, self.die_once, self.raises, self.nap_s = poison, die_once, raises, nap_s

    def reads(self, missing: frozenset[str]) -> Sequence[Read]:
        return [Read(SAMPLES, ("url", "text"))]

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        for number, batch in enumerate(batches):
            time.sleep(self.nap_s)
            if number == 1 and task.shard.name == self.poison:
                os._exit(9)
            if number == 1 and task.shard.name == self.raises:
                raise ValueError("this shard cannot be done")
            if number == 1 and self.die_once is not None and not self.die_once.exists():
                self.die_once.write_text("died")
                os._exit(9)
            yield {"images": _images(batch)}


def _images(batch: pa.RecordBatch) -> pa.RecordBatch:
    urls = batch.column("url").to_pylist()
    ok = [row % 5 != 0 for row in range(len(urls))]
    size = [8 if good else None for good in ok]
    columns = {
        "status": ["ok" if good else "timeout" for good in ok], "error": [None if good else "slow" for good in ok],
        "ext": ["jpg" if good else None for good in ok], "width": size, "height": size, "original_width": size,
        "original_height": size, "original_bytes": size, "sha256": [url[-3:] if url else None for url in urls],
        IMAGE: [url.encode() if good else None for url, good in zip(urls, ok, strict=True)],
    }  # fmt: skip
    return pa.RecordBatch.from_pydict(columns, schema=pa.schema([*IMAGE_FIELDS, pa.field(IMAGE, pa.binary())]))


class ToyScore(Stage):
    """Counts the bytes of each image; null where there is none."""

    name = "score"
    resources = Resources(cpus=0.5)

    def __init__(self, name: str = "length", threshold: int = 0) -> None:
        super().__init__()
        schema = pa.schema([KEY, pa.field(f"{name}_bytes", pa.int32())])
        settings = {"threshold": threshold}
        self.tables = (TableSpec(f"scores_{name}", 1, schema, settings, inputs=inputs_of(ToyFetch.tables)),)

    def reads(self, missing: frozenset[str]) -> Sequence[Read]:
        return [Read(ToyFetch.tables[0], ("status", IMAGE))]

    def setup(self) -> None:
        """As a stage with a model has one: on Ray such a stage holds an actor, others are tasks."""

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        (spec,) = self.tables
        for batch in batches:
            lengths = [None if image is None else len(image) for image in batch.column(IMAGE).to_pylist()]
            yield {spec.name: pa.RecordBatch.from_pydict({spec.columns[0]: pa.array(lengths, pa.int32())})}


def bytes_of(store: Store) -> dict[str, bytes]:
    """Every file of tables at rest (not the engine's notes), by path."""
    root = Path(store.full(""))
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in files
        if not path.relative_to(root).parts[0].startswith("_")
    }

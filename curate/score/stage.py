"""The score stages: `score` decodes each image once for all image scorers, `score_text` needs no images.

Every entry of the recipe's `score:` section has tables of its own, `scores_<entry>` and `embeddings_<entry>`, named by
its settings and weights; adding an entry computes that one alone. Heads read features in memory when they are computed
in the same pass, else from the committed table: the same bits, since both are rounded to float16. The next chunk is
decoded and prepared in threads while the device works on this one.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any

import pyarrow as pa

from curate.errors import PlanError, StageError
from curate.schema import KEY, TableSpec, inputs_of
from curate.score.chunk import CPU_PIXELS, GPU_PIXELS, Chunk, chunks
from curate.score.device import gpu_present
from curate.score.pool_counts import is_pool_count
from curate.score.registry import build, kind_of
from curate.score.run import Runner, prepare, score_texts
from curate.score.scorer import Device, FeatureScorer, ImageScorer, Scorer, TextScorer
from curate.stage import Read, Resources, Stage, Task
from curate.store import Store

CPU_ROWS = 64  # images per chunk; larger ones only hold more memory
GPU_ROWS = 1024  # so that a network's forwards queue up; networks' inputs of a chunk are about 300 MB each
GPU_CPUS = 8.0  # threads that decode for one GPU, about 400 images of 512 px a second each
TEXT_ROWS = 1024


def score_stages(section: Mapping[str, Mapping[str, Any]], samples: TableSpec, images: TableSpec | None) -> list[Stage]:
    """The stages for a recipe's `score:` section: none, `score`, `score_text`, or both.

    `images` may be None when only texts are scored. Raises ConfigError for a wrong section, PlanError when an image
    scorer has no images, WeightsError when a file that names a table is missing.
    """
    return [*image_stages(section, samples, images), *text_stages(section, samples)]


def text_stages(section: Mapping[str, Mapping[str, Any]], samples: TableSpec) -> list[Stage]:
    """`score_text`, if the section has text scorers: it needs no images, and may go before the fetch."""
    texts = [scorer for scorer in _built(section) if isinstance(scorer, TextScorer)]
    return [ScoreTextStage(texts, samples)] if texts else []


def image_stages(section: Mapping[str, Mapping[str, Any]], samples: TableSpec, images: TableSpec | None) -> list[Stage]:
    """`score`, if the section has scorers of images. Raises PlanError when it has, and there are no images."""
    others = [scorer for scorer in _built(section) if not isinstance(scorer, TextScorer)]
    if others and images is None:
        raise PlanError(f"score.{others[0].name}: scores images, and this pipeline has none; add `fetch:` or `adopt:`")
    return [ScoreStage(others, samples, images)] if others and images is not None else []


def _built(section: Mapping[str, Mapping[str, Any]]) -> list[Scorer]:
    return build({name: entry for name, entry in section.items() if not is_pool_count(entry)})


def specs_of(scorer: Scorer, inputs: Sequence[TableSpec]) -> list[TableSpec]:
    """The tables of one scorer."""
    specs: list[TableSpec] = []
    for table, fields in (("scores", scorer.fields), ("embeddings", scorer.embeddings)):
        if fields:
            settings = {
                "scorer": kind_of(scorer),
                "columns": {field.name: str(field.type) for field in fields},
                **scorer.identity(),
            }
            schema = pa.schema([KEY, *fields])
            specs.append(TableSpec(f"{table}_{scorer.name}", scorer.version, schema, settings, inputs_of(inputs)))
    return specs


def device_of(scorer: Scorer) -> Device:
    """Where this scorer computes on this machine. Raises StageError when CUDA is asked for and not there."""
    if scorer.how is None:
        return Device()
    if scorer.how.device == "cpu" or (scorer.how.device == "auto" and not gpu_present()):
        return Device("cpu", scorer.how.threads)
    if not gpu_present():
        raise StageError(f"score.{scorer.name}.device: cuda, and this worker sees no GPU; write device: auto or cpu")
    return Device("cuda", scorer.how.threads)


def _wants_gpu(scorer: Scorer) -> bool:
    return scorer.how is not None and (scorer.how.device == "cuda" or (scorer.how.device == "auto" and gpu_present()))


class ScoreStage(Stage):
    """Image scorers and heads; see the module's docstring."""

    name = "score"

    def __init__(self, scorers: Sequence[Scorer], samples: TableSpec, images: TableSpec) -> None:
        super().__init__()
        self._samples, self._images = samples, images
        self._scorers = list(scorers)
        self._specs: dict[str, list[TableSpec]] = {}
        for scorer in sorted(scorers, key=lambda scorer: isinstance(scorer, FeatureScorer)):
            self._specs[scorer.name] = specs_of(scorer, self._inputs(scorer))
        self.tables = tuple(chain.from_iterable(self._specs[scorer.name] for scorer in scorers))
        self._on_gpu = any(_wants_gpu(scorer) for scorer in scorers)
        self.resources = Resources(GPU_CPUS, 1.0) if self._on_gpu else Resources()

    def _inputs(self, scorer: Scorer) -> list[TableSpec]:
        if isinstance(scorer, FeatureScorer):
            return [self._embeddings(scorer.source)]
        reads_text = isinstance(scorer, ImageScorer) and scorer.reads_text
        return [self._images, self._samples] if reads_text else [self._images]

    def _embeddings(self, entry: str) -> TableSpec:
        return next(spec for spec in self._specs[entry] if spec.name == f"embeddings_{entry}")

    def _needed(self, missing: frozenset[str]) -> list[Scorer]:
        return [s for s in self._scorers if any(spec.name in missing for spec in self._specs[s.name])]

    def check(self, store: Store) -> None:
        """See Stage.check: every scorer's weights."""
        for scorer in self._scorers:
            scorer.check()

    def reads(self, missing: frozenset[str]) -> Sequence[Read]:
        """Pixels and texts only where a missing table needs them; features that are committed."""
        needed = self._needed(missing)
        pixels = [scorer for scorer in needed if isinstance(scorer, ImageScorer)]
        found = [
            Read(self._images, ("status", "width", "height", "image") if pixels else ("status", "width", "height"))
        ]
        if any(scorer.reads_text for scorer in pixels):
            found.append(Read(self._samples, ("text",)))
        return found + [Read(self._embeddings(source), (f"{source}_image",)) for source in self._sources(missing)]

    def _sources(self, missing: frozenset[str]) -> list[str]:
        """Entries whose committed features are read."""
        heads = [scorer for scorer in self._needed(missing) if isinstance(scorer, FeatureScorer)]
        return sorted({head.source for head in heads if f"embeddings_{head.source}" not in missing})

    def setup(self) -> None:
        """Load every model onto its device."""
        for scorer in self._scorers:
            scorer.load(device_of(scorer))

    def teardown(self) -> None:
        """Free the models."""
        for scorer in self._scorers:
            scorer.unload()

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        """See Stage.process; rows come out chunk by chunk."""
        needed = self._needed(task.missing)
        pixels = [scorer for scorer in needed if isinstance(scorer, ImageScorer)]
        heads = [scorer for scorer in needed if isinstance(scorer, FeatureScorer)]
        for scorer in needed:
            scorer.begin()
        runner = Runner(pixels, heads, self.counters, abreast=self._on_gpu)
        specs = [spec for spec in self.tables if spec.name in task.missing]
        rows, most = (GPU_ROWS, GPU_PIXELS) if self._on_gpu else (CPU_ROWS, CPU_PIXELS)
        sources = self._sources(task.missing)
        with ThreadPoolExecutor(max(1, int(self.resources.cpus)), "curate-decode") as pool:
            waiting: tuple[Chunk, list[Future[list[Any]]]] | None = None
            for chunk in chunks(batches, rows, most, sources):
                following = (chunk, _submit(pool, pixels, chunk))
                if waiting is not None:
                    yield _tables(specs, runner.run(waiting[0], [job.result() for job in waiting[1]]))
                waiting = following
            if waiting is not None:
                yield _tables(specs, runner.run(waiting[0], [job.result() for job in waiting[1]]))


def _submit(pool: ThreadPoolExecutor, scorers: Sequence[ImageScorer[Any]], chunk: Chunk) -> list[Future[list[Any]]]:
    if not scorers:
        return []
    pairs = zip(chunk.images, chunk.texts, strict=True)
    jobs = [pool.submit(prepare, scorers, data, text) for data, text in pairs]
    chunk.images.clear()  # the jobs hold the bytes now, and drop them one by one
    return jobs


def _tables(specs: Sequence[TableSpec], columns: Mapping[str, pa.Array]) -> dict[str, pa.RecordBatch]:
    return {
        spec.name: pa.RecordBatch.from_arrays(
            [columns[name] for name in spec.columns],
            schema=pa.schema([spec.schema.field(name) for name in spec.columns]),
        )
        for spec in specs
    }


class ScoreTextStage(Stage):
    """Text scorers: each distinct text of a batch once."""

    name = "score_text"
    batch_rows = TEXT_ROWS

    def __init__(self, scorers: Sequence[TextScorer], samples: TableSpec) -> None:
        super().__init__()
        self._samples = samples
        self._scorers = list(scorers)
        self._specs = {scorer.name: specs_of(scorer, [samples]) for scorer in scorers}
        self.resources = Resources(1.0, 1.0) if any(_wants_gpu(scorer) for scorer in scorers) else Resources()
        self.tables = tuple(chain.from_iterable(self._specs.values()))

    def check(self, store: Store) -> None:
        """See Stage.check."""
        for scorer in self._scorers:
            scorer.check()

    def reads(self, missing: frozenset[str]) -> Sequence[Read]:
        """Texts."""
        return [Read(self._samples, ("text",))]

    def setup(self) -> None:
        """Load what the scorers need."""
        for scorer in self._scorers:
            scorer.load(device_of(scorer))

    def teardown(self) -> None:
        """Free it."""
        for scorer in self._scorers:
            scorer.unload()

    def process(self, task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[Mapping[str, pa.RecordBatch]]:
        """See Stage.process."""
        scorers = [s for s in self._scorers if any(spec.name in task.missing for spec in self._specs[s.name])]
        specs = [spec for spec in self.tables if spec.name in task.missing]
        for scorer in scorers:
            scorer.begin()
        for batch in batches:
            texts = batch.column("text").to_pylist()
            columns: dict[str, pa.Array] = {}
            for scorer in scorers:
                columns |= score_texts(scorer, texts, self.counters)
            yield _tables(specs, columns)

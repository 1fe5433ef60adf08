"""Scoring a chunk: prepared samples in, Arrow columns out, every row accounted for.

Pure but for the models: knows no table, no shard and no storage. What could not be scored is null and counted with a
reason; a scorer that fails on every row of a chunk is broken, and its error is raised.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from curate.score.batches import Batches, Outcome
from curate.score.chunk import Chunk
from curate.score.columns import scatter, to_arrow, vectors_of
from curate.score.decode import Unscorable, decode
from curate.score.scorer import FeatureScorer, ImageScorer, Scorer, TextScorer

FEATURE_BATCH = 4096
TEXT_BATCH = 1024


class Raised:
    """A scorer's `prepare` raised on a sample."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    @property
    def reason(self) -> str:
        """For the counters."""
        return f"raised_{type(self.error).__name__}"


def prepare(scorers: Sequence[ImageScorer[Any]], data: bytes | None, text: str | None) -> list[Any]:
    """Decode once and prepare for every scorer: one prepared value, Unscorable or Raised per scorer."""
    picture = Unscorable("no_image") if data is None else decode(data)
    if isinstance(picture, Unscorable):
        return [picture] * len(scorers)
    prepared: list[Any] = []
    for scorer in scorers:
        try:
            prepared.append(scorer.prepare(picture, text))
        except Exception as error:
            prepared.append(Raised(error))
    return prepared


class Runner:
    """Runs loaded scorers over chunks and counts. `columns` of a result have `chunk.rows` rows, in Arrow's types.

    `abreast`: scorers work side by side, each in a thread of its own, so that one uses the GPU while another looks for
    contours or waits. Each sees the same batches in the same order either way.
    """

    def __init__(
        self,
        images: Sequence[ImageScorer[Any]],
        heads: Sequence[FeatureScorer],
        counts: Counter[str],
        *,
        abreast: bool = False,
    ) -> None:
        self._images, self._heads, self._counts = images, heads, counts
        self._abreast = abreast
        self._batches = {scorer.name: Batches(scorer.batch_size) for scorer in images}

    def run(self, chunk: Chunk, prepared: Sequence[Sequence[Any]]) -> dict[str, pa.Array]:
        """Columns of all scorers by name. `prepared[i]` is what `prepare` gave for the i-th image of the chunk."""
        columns: dict[str, pa.Array] = {}
        work = [(scorer, [values[number] for values in prepared]) for number, scorer in enumerate(self._images)]
        for group in (
            [(scorer, values) for scorer, values in work if not scorer.follows],
            [(scorer, values) for scorer, values in work if scorer.follows],
        ):
            for found, counts in self._side_by_side(group, chunk):
                columns |= found
                self._counts += counts
        for head in self._heads:
            columns |= self._head(head, chunk, columns, self._counts)
        return columns

    def _side_by_side(
        self, work: Sequence[tuple[ImageScorer[Any], list[Any]]], chunk: Chunk
    ) -> list[tuple[dict[str, pa.Array], Counter[str]]]:
        """Columns and counts of each scorer, in their order."""
        if not self._abreast or len(work) < 2:
            return [self._image(scorer, chunk, values) for scorer, values in work]
        with ThreadPoolExecutor(len(work), "curate-score") as pool:
            return [
                job.result() for job in [pool.submit(self._image, scorer, chunk, values) for scorer, values in work]
            ]

    def _image(
        self, scorer: ImageScorer[Any], chunk: Chunk, prepared: Sequence[Any]
    ) -> tuple[dict[str, pa.Array], Counter[str]]:
        counts: Counter[str] = Counter()
        good = [row for row, value in enumerate(prepared) if not isinstance(value, Unscorable | Raised)]
        bad = [value for value in prepared if isinstance(value, Unscorable | Raised)]
        raised = [value for value in bad if isinstance(value, Raised)]
        if not good and len(raised) > 1:
            raise raised[0].error
        for value in bad:
            counts[f"{label(scorer)}: {value.reason}"] += 1
        outcome = self._batches[scorer.name].run(scorer.score, [prepared[row] for row in good])
        at = [chunk.at[good[row]] for row in outcome.kept]
        return _columns(scorer, outcome, at, chunk.rows, counts), counts

    def _head(
        self, head: FeatureScorer, chunk: Chunk, columns: Mapping[str, pa.Array], counts: Counter[str]
    ) -> dict[str, pa.Array]:
        computed = columns.get(f"{head.source}_image")
        if computed is not None and head.source not in chunk.vectors:
            values, given = vectors_of(computed)
            at = [int(row) for row in np.flatnonzero(given)]
            features = values[at]
        else:
            pairs = zip(chunk.at, chunk.vectors[head.source], strict=True) if chunk.at else ()
            found = [(row, vector) for row, vector in pairs if vector is not None]
            at = [row for row, _ in found]
            features = np.stack([vector for _, vector in found]) if found else np.empty((0, 1), dtype=np.float16)
        rows = list(features.astype(np.float32))
        outcome = Batches(FEATURE_BATCH).run(lambda part: head.score(np.stack(part)), rows)
        absent = len(chunk.at) - len(at)
        if absent:
            counts[f"{label(head)}: no_features"] += absent
        return _columns(head, outcome, [at[row] for row in outcome.kept], chunk.rows, counts)


def _columns(
    scorer: Scorer, outcome: Outcome, at: Sequence[int], rows: int, counts: Counter[str]
) -> dict[str, pa.Array]:
    for reason in outcome.failed.values():
        counts[f"{label(scorer)}: {reason}"] += 1
    columns: dict[str, pa.Array] = {}
    for field in (*scorer.fields, *scorer.embeddings):
        array, not_finite = to_arrow(field, outcome.column(field.name), len(at))
        if not_finite:
            counts[f"{label(scorer)}.{field.name}: not_finite"] += not_finite
        if array.null_count > not_finite:
            counts[f"{label(scorer)}.{field.name}: no_value"] += array.null_count - not_finite
        columns[field.name] = scatter(array, at, rows)
    return columns


def score_texts(scorer: TextScorer, texts: Sequence[str | None], counts: Counter[str]) -> dict[str, pa.Array]:
    """Columns of a text scorer, each distinct text scored once; null for a null text."""
    distinct = list(dict.fromkeys(text for text in texts if text is not None))
    outcome = Batches(TEXT_BATCH).run(scorer.score, distinct)
    failed = {distinct[row]: reason for row, reason in outcome.failed.items()}
    counts.update(f"{label(scorer)}: {failed[text]}" for text in texts if text is not None and text in failed)
    place = {distinct[row]: number for number, row in enumerate(outcome.kept)}
    at = [row for row, text in enumerate(texts) if text in place]
    picks = [place[text] for text in texts if text is not None and text in place]
    columns: dict[str, pa.Array] = {}
    for field in (*scorer.fields, *scorer.embeddings):
        values = outcome.column(field.name)
        array, not_finite = to_arrow(field, [values[pick] for pick in picks], len(picks))
        if not_finite:
            counts[f"{label(scorer)}.{field.name}: not_finite"] += not_finite
        columns[field.name] = scatter(array, at, len(texts))
    return columns


def label(scorer: Scorer) -> str:
    """The table by which people know a scorer's counts."""
    return f"scores_{scorer.name}" if scorer.fields else f"embeddings_{scorer.name}"

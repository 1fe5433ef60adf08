"""Images outside the pool, measured as the pool's own: by the scorer of the recipe that writes a column.

So a seed set, an evaluation set and the pool share one space. It knows no set and no storage; an image that cannot be
decoded gives a null.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from json import dumps, loads
from typing import Any

import pyarrow as pa

from curate.errors import PlanError
from curate.score.chunk import Chunk
from curate.score.pool_counts import is_pool_count
from curate.score.registry import build
from curate.score.run import Runner, prepare
from curate.score.scorer import ImageScorer
from curate.score.stage import CPU_ROWS, device_of

Section = Mapping[str, Mapping[str, Any]]


def packed(section: Section) -> str:
    """The recipe's `score` without what counts over the pool; hashable, so that a worker loads a model once."""
    return dumps({name: dict(entry) for name, entry in section.items() if not is_pool_count(entry)})


def scorer_of(section: str, column: str) -> ImageScorer[Any]:
    """The scorer of a packed section that writes the column. Raises PlanError where no image scorer does."""
    for scorer in build(loads(section)):
        if isinstance(scorer, ImageScorer) and any(f.name == column for f in (*scorer.fields, *scorer.embeddings)):
            return scorer
    raise PlanError(f"no image scorer of this recipe writes {column}")


def measure(section: str, column: str, images: Iterable[tuple[str, bytes]]) -> Iterator[tuple[list[str], pa.Array]]:
    """(names, column) of a batch of images after another."""
    scorer, left = _loaded(section, column), iter(images)
    scorer.begin()
    runner = Runner([scorer], [], Counter[str]())
    with ThreadPoolExecutor(2, "curate-decode") as pool:
        while batch := list(islice(left, CPU_ROWS)):
            prepared = list(pool.map(lambda one: prepare([scorer], one[1], None), batch))
            columns = runner.run(Chunk(len(batch), list(range(len(batch))), texts=[None] * len(batch)), prepared)
            yield [name for name, _ in batch], columns[column]


@lru_cache(maxsize=1)
def _loaded(section: str, column: str) -> ImageScorer[Any]:
    scorer = scorer_of(section, column)
    scorer.load(device_of(scorer))
    return scorer

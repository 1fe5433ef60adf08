"""Rows of a shard gathered into chunks that are decoded and scored together.

A chunk ends after a fixed number of rows that have an image, or of pixels: both are read from committed columns, so a
resumed shard has the same chunks, hence the same batches and the same bits. The bound on pixels is the bound on memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.schema import OK
from curate.score.columns import vectors_of

CPU_PIXELS = 64_000_000  # 192 MB of RGB; two chunks are in flight
GPU_PIXELS = 4 * CPU_PIXELS  # 1,000 pictures of 512 pixels
UNKNOWN_PIXELS = 1_000_000  # where an adopted pool does not say


@dataclass
class Chunk:
    """`rows` rows, of which those at `at` have an image; the lists are aligned with `at`."""

    rows: int = 0
    at: list[int] = field(default_factory=list)
    images: list[bytes | None] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    vectors: dict[str, list[npt.NDArray[np.float16] | None]] = field(default_factory=dict)
    pixels: int = 0


def chunks(batches: Iterator[pa.RecordBatch], size: int, most: int, sources: Sequence[str]) -> Iterator[Chunk]:
    """Cut batches with `status`, `width`, `height` and, where asked for, `image`, `text` and `<source>_image`."""
    chunk = Chunk()
    for batch in batches:
        columns = {name: batch.column(name) for name in batch.schema.names}
        vectors = {source: vectors_of(columns[f"{source}_image"]) for source in sources}
        plain = {name: columns[name].to_pylist() for name in ("status", "width", "height", "text") if name in columns}
        for row in range(batch.num_rows):
            if plain["status"][row] == OK:
                chunk.at.append(chunk.rows)
                chunk.images.append(columns["image"][row].as_py() if "image" in columns else None)
                chunk.texts.append(plain["text"][row] if "text" in plain else None)
                for source, (values, given) in vectors.items():
                    chunk.vectors.setdefault(source, []).append(values[row] if given[row] else None)
                width, height = plain["width"][row], plain["height"][row]
                chunk.pixels += width * height if width and height else UNKNOWN_PIXELS
            chunk.rows += 1
            if len(chunk.at) >= size or chunk.pixels >= most:
                yield chunk
                chunk = Chunk()
    if chunk.rows:
        yield chunk

"""`curate pack`: a set of images as WebDataset tars that a recipe adopts beside its crawl, to be taken as they are.

    <out>/00000.tar        00000000.jpg … as they were, byte for byte
    <out>/00000.parquet    a row an image: key, url (what names it in its set), dataset, size, sha256, status

`dataset` is the name by which a recipe then knows the set. An image that cannot be opened is a row with its reason.
Killed anywhere, the same command goes on after the last whole tar. It refuses a set that holds no image, and to write
over a tar or beside tables of anything else: every image of an earlier run is compared.
"""

import hashlib
import io
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curate.errors import PlanError
from curate.image_sets import images_of, listing, pieces
from curate.metrics import Ticker
from curate.store import Store
from curate.tar import TarWriter

IMAGES_PER_TAR = 10_000  # as img2dataset; a tar becomes a shard of the pool
ROWS = pa.schema([
    ("key", pa.string()), ("url", pa.string()), ("dataset", pa.string()), ("status", pa.string()),
    ("error_message", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string()),
])  # fmt: skip
SUFFIXES = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff",
    "AVIF": "avif",
}  # fmt: skip


def pack(images: str, name: str, out: str, ticker: Ticker, per_tar: int = IMAGES_PER_TAR) -> tuple[int, int]:
    """Write the tars of a set; (images, those that cannot be opened). Memory: an image. Raises PlanError."""
    if not name.strip() or not name.isprintable():
        raise PlanError(f"pack: --name is {name!r}; expected a word that a recipe can ask for, e.g. imagenet1k")
    store, files = Store(out), listing(images, "pack")
    home = PurePosixPath(store.fs.unstrip_protocol(store.full("x"))).parent
    if images.endswith(".tar") and any(PurePosixPath(url).parent == home for url, _ in files):
        raise PlanError(f"pack: --out {out} holds the set's own tars; choose another --out")
    store.sweep("")
    found = (image for piece in pieces(images) for image in images_of(piece))
    total = unusable = number = 0
    while (first := next(found, None)) is not None:
        part = chain([first], islice(found, per_tar - 1))
        if store.exists(f"{number:05d}.parquet"):
            table = _as_before(store, number, name, part)
        else:
            table = _write(store, number, name, part)
        total, number = total + table.num_rows, number + 1
        unusable += sum(status != "success" for status in table["status"].to_pylist())
        ticker.advance(table.num_rows, f"{number} tars")
    if store.exists(f"{number:05d}.parquet") or store.exists(f"{number:05d}.tar"):
        raise _other(store, number)
    if total == unusable:
        raise PlanError(f"pack: {images} holds no image that can be opened")
    return total, unusable


def _other(store: Store, number: int) -> PlanError:
    return PlanError(f"pack: {store.root}/{number:05d}.tar is of other images or another name; choose another --out")


def _as_before(store: Store, number: int, name: str, part: Iterator[tuple[str, bytes]]) -> pa.Table:
    if not store.exists(f"{number:05d}.tar"):
        raise PlanError(f"pack: {store.root}/{number:05d}.parquet has no tar; delete it, or choose another --out")
    try:
        with store.open(f"{number:05d}.parquet") as handle:
            table = pq.read_table(handle, schema=ROWS)
    except pa.ArrowException:
        raise _other(store, number) from None
    rows = [(url, name, _facts(data).get("sha256")) for url, data in part]
    if rows != [(row["url"], row["dataset"], row["sha256"]) for row in table.to_pylist()]:
        raise _other(store, number)
    return table


def _write(store: Store, number: int, name: str, part: Iterator[tuple[str, bytes]]) -> pa.Table:
    rows = []
    with store.staged(f"{number:05d}.tar") as local:
        with local.open("wb") as stream:
            tar = TarWriter(stream)
            for place, (url, data) in enumerate(part):
                row = {"key": f"{number:05d}{place:05d}", "url": url, "dataset": name, **_facts(data)}
                if row["status"] == "success":
                    tar.add(f"{row['key']}.{row.pop('suffix')}", data)
                rows.append(row)
            tar.finish()
        if store.exists(f"{number:05d}.tar"):  # of a killed run, which had written the same, or somebody's own
            with local.open("rb") as made, store.open(f"{number:05d}.tar") as held:
                digests = {hashlib.file_digest(cast(Any, file), "sha256").digest() for file in (made, held)}
                if len(digests) > 1:
                    raise _other(store, number)
    table = pa.Table.from_pylist(rows, schema=ROWS)
    with store.staged(f"{number:05d}.parquet") as local:
        pq.write_table(table, local, compression="zstd")
    return table


def _facts(data: bytes) -> dict[str, str | int]:
    """Size, hash and the name's ending of an image; why it is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, (width, height) = str(image.format), image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return {"status": "failed_to_resize", "error_message": f"cannot identify: {type(error).__name__}"}
    if kind not in SUFFIXES:
        return {"status": "failed_to_resize", "error_message": f"{kind} is none of {', '.join(SUFFIXES)}"}
    digest = hashlib.sha256(data).hexdigest()
    return {"status": "success", "suffix": SUFFIXES[kind], "width": width, "height": height, "sha256": digest}

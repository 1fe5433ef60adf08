"""Write the demo's small web to disk: bodies, what the server answers, the URL table, and the truth about it.

`build` leaves `files/`, `web.json` (for `server`), `urls.parquet` (what the main job reads) and `truth.parquet` (what a
right run must find). It refuses to guess: columns of COYO-700M that a small web cannot know are null. The table was
"crawled" when every page still held its picture, as with real tables: a page that now answers 404 has the size and
pHash of the picture it used to show.
"""

import gzip
import io
import json
import shutil
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

import imagehash
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curate import schema
from curate.demo.drawing import CONTENT_TYPES
from curate.demo.planting import EXPECTED, FETCHED, Page, plan

VERSION: Final = 2
DEFAULT_PORT: Final = 18765  # fixed: a sample's key is a hash of its URL, and a second run must find the same keys
PRIVATE_HOST: Final = "127.0.0.2"  # loopback too, but outside 127.0.0.1/32, the only network that the demo allows
BOMB_SIDE: Final = 30_000  # pixels; 112 MB of rows in a PNG of 0.1 MB
BOMB_BYTES: Final = 256 << 20  # what bomb.gz becomes when a client inflates it
OPT_OUTS: Final = ("noai", "noimageai", "noai, noimageai")  # X-Robots-Tag values, as img2dataset reads them

# COYO-700M's 17 columns in its order (https://github.com/kakaobrain/coyo-dataset, README).
COYO_SCHEMA: Final = pa.schema(
    {
        "id": pa.int64(),
        "url": pa.string(),
        "text": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "image_phash": pa.string(),
        "text_length": pa.int32(),
        "word_count": pa.int32(),
        "num_tokens_bert": pa.int32(),
        "num_tokens_gpt": pa.int32(),
        "num_faces": pa.int32(),
        "clip_similarity_vitb32": pa.float32(),
        "clip_similarity_vitl14": pa.float32(),
        "nsfw_score_opennsfw2": pa.float32(),
        "nsfw_score_gantman": pa.float32(),
        "watermark_score": pa.float32(),
        "aesthetic_score_laion_v2": pa.float32(),
    }
)
TRUTH_SCHEMA: Final = pa.schema(
    [
        schema.KEY,
        pa.field("id", pa.int64()),  # of the row in urls.parquet
        pa.field("url", pa.string()),
        pa.field("text", pa.string()),
        pa.field("kind", pa.string()),  # a key of planting.COUNTS
        pa.field("expected_status", pa.list_(pa.string())),  # any of these is right
        pa.field("duplicate_group", pa.string()),  # null when no other row shows this picture
        pa.field("phash_distance", pa.int32()),  # bits, to the picture it was copied from; null for originals
        pa.field("content", pa.string()),  # shapes, scene, document, chart or sign
        pa.field("caption_is_true", pa.bool_()),
        pa.field("is_watermarked", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Route:
    """What the server answers at one path. `file` lies in `files/`; a redirect has a Location and no file."""

    behaviour: str = "send"  # or "hang", "truncate"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    file: str | None = None


def build(folder: Path, port: int = DEFAULT_PORT, seed: int = 0) -> Path:
    """Draw and write the web that will be served at http://127.0.0.1:`port`; return the path of `urls.parquet`.

    A web of the same version, port and seed that is already there is left as it is, so that a second run reads the
    same bytes. About 10 CPU-seconds and 45 MB.

    Raises:
        ValueError: `seed` is outside 0 to 99.
    """
    table, manifest = folder / "urls.parquet", folder / "web.json"
    settings = {"version": VERSION, "port": port, "seed": seed}
    if manifest.exists() and json.loads(manifest.read_text("utf-8"))["settings"] == settings:
        return table
    manifest.unlink(missing_ok=True)  # it comes last, so a killed build is built again
    shutil.rmtree(folder / "files", ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    pages = plan(seed)
    routes = common_routes(folder / "files")
    for row, page in enumerate(pages):
        if page.path:
            routes |= page_routes(folder / "files", page, row, port)
    urls = [page.path and f"http://127.0.0.1:{port}{page.path}" for page in pages]
    pq.write_table(coyo_table(pages, urls), table)
    pq.write_table(truth_table(pages, urls), folder / "truth.parquet")
    listed = {path: asdict(route) for path, route in sorted(routes.items())}
    unfinished = folder / ".web.json"
    unfinished.write_text(json.dumps({"settings": settings, "routes": listed}, indent=1) + "\n", "utf-8")
    unfinished.replace(manifest)
    return table


def common_routes(files: Path) -> dict[str, Route]:
    """Write the bodies that no single page owns, and return the routes that are not in the table."""
    (files / "robots.txt").write_text("User-agent: *\nDisallow: /members/\n", "utf-8")
    (files / "gone.html").write_text(
        "<!doctype html><title>Gone</title><p>This picture has moved away.\n" * 20, "utf-8"
    )
    (files / "bomb.png").write_bytes(pixel_bomb(BOMB_SIDE))
    (files / "bomb.gz").write_bytes(gzip_bomb(BOMB_BYTES))
    return {"/robots.txt": Route(headers={"Content-Type": "text/plain"}, file="robots.txt")}


def page_routes(files: Path, page: Page, row: int, port: int) -> dict[str, Route]:
    """Write the page's body and return its route, and the routes that its redirects lead to."""
    path = page.path or "/"
    name = path.strip("/").replace("/", "-")
    (files / name).write_bytes(page.body)
    headers = {"Content-Type": CONTENT_TYPES[page.encoding]}
    picture = Route(headers=headers, file=name)
    html, opt_out = {"Content-Type": "text/html"}, {"X-Robots-Tag": OPT_OUTS[row % len(OPT_OUTS)]}
    fates = {
        "http_404": Route(status=404, headers=html, file="gone.html"),
        "http_500": Route(status=500, headers=html, file="gone.html"),
        "hang": Route(behaviour="hang"),
        "truncated": replace(picture, behaviour="truncate"),
        "redirected": redirect(f"/moved{path}", 301 if row % 2 else 302),
        "redirect_loop": redirect(f"{path}/back", 302),
        "redirect_private": redirect(f"http://{PRIVATE_HOST}:{port}/secret.jpg", 302),
        "html": Route(headers={"Content-Type": "image/jpeg"}, file="gone.html"),
        "bomb_pixels": Route(headers={"Content-Type": "image/png"}, file="bomb.png"),
        "bomb_gzip": Route(headers={**headers, "Content-Encoding": "gzip"}, file="bomb.gz"),
        "opted_out": replace(picture, headers={**headers, **opt_out}),
    }
    beyond = {
        "redirected": {f"/moved{path}": picture},
        "redirect_loop": {f"{path}/back": redirect(path, 302)},
        "redirect_private": {"/secret.jpg": picture},
    }
    return {path: fates.get(page.kind, picture), **beyond.get(page.kind, {})}


def redirect(location: str, status: int) -> Route:
    """A redirect to `location`, absolute or on this host."""
    return Route(status=status, headers={"Location": location})


def coyo_table(pages: Sequence[Page], urls: Sequence[str | None]) -> pa.Table:
    """The URL table. Sizes, pHash, lengths and the number of faces (there are none) are known; the rest is null."""
    rows = []
    for i, (page, url) in enumerate(zip(pages, urls, strict=True)):
        with Image.open(io.BytesIO(page.body)) as picture:
            width, height = picture.size
            phash = str(imagehash.phash(picture))
        known = {"id": 1_000_000 + 7 * i, "url": url, "text": page.text, "width": width, "height": height}
        counts = {"text_length": len(page.text), "word_count": len(page.text.split(" ")), "num_faces": 0}
        rows.append({**known, "image_phash": phash, **counts})
    return pa.Table.from_pylist(rows, schema=COYO_SCHEMA)


def truth_table(pages: Sequence[Page], urls: Sequence[str | None]) -> pa.Table:
    """What was planted in each row of `coyo_table`, in the same order."""
    rows = [
        {
            "key": schema.key_of(url or None, page.text),  # ingest reads an empty URL as none
            "id": 1_000_000 + 7 * i,
            "url": url,
            "text": page.text,
            "kind": page.kind,
            "expected_status": EXPECTED.get(page.kind, FETCHED),
            "duplicate_group": page.group,
            "phash_distance": page.phash_distance,
            "content": page.content,
            "caption_is_true": page.caption_is_true,
            "is_watermarked": page.is_watermarked,
        }
        for i, (page, url) in enumerate(zip(pages, urls, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=TRUTH_SCHEMA)


def pixel_bomb(side: int) -> bytes:
    """A valid PNG of `side` × `side` black 1-bit pixels: small as a file, `side`² pixels when decoded."""

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    packed = b"".join(packer.compress(row * 500) for _ in range(side // 500)) + packer.compress(row * (side % 500))
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", packed + packer.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def gzip_bomb(size: int) -> bytes:
    """A gzip stream that inflates to `size` zero bytes (a multiple of 1 MiB), about a thousandth of it long."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as stream:
        for _ in range(size >> 20):
            stream.write(bytes(1 << 20))
    return buffer.getvalue()

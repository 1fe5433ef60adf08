"""Seed sets that come as images, embedded by the scorer of the pool's own vectors: one settings entry, one space.

    _seeds/<fingerprint>/<number>.npz     unit vectors of a chunk of images, float16 as the pool's are; images read
    _seeds/<fingerprint>/rows.json        vectors of each file; images read, and those that gave none

A set is a folder, here or behind any fsspec URL; WebDataset tars, by a path or pattern that ends in .tar; or a dataset
of the library `datasets`, `datasets:FOLDER[:SPLIT]` or, from the hub, `datasets:NAME@COMMIT[:SPLIT]`, with its column
of images. An image that cannot be decoded is counted and gives no vector. It refuses sets without images, a dataset of
the hub that names no commit, since nobody could tell when it changed, and a column of vectors that no image scorer of
the recipe writes.
"""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from itertools import islice
from json import dumps, loads
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
import numpy as np

from curate.engine.driver import OnDevice
from curate.errors import PlanError
from curate.metrics import Ticker
from curate.schema import Shard
from curate.score.chunk import Chunk
from curate.score.columns import vectors_of
from curate.score.pool_counts import is_pool_count
from curate.score.registry import build
from curate.score.run import Runner, prepare
from curate.score.scorer import ImageScorer
from curate.score.stage import CPU_ROWS, device_of, specs_of
from curate.stage import CrossStep, Map
from curate.store import Store
from curate.vectors import get_arrays, put_arrays

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
DATASETS = "datasets:"
OF_THE_HUB = re.compile(r"[^@:]+@[0-9a-f]{40}")  # a branch or a tag may move
IMAGES_PER_ITEM = 1024  # of a folder or dataset; loading a model takes as long as 100 images on a CPU
Section = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Source:
    """A piece of a set: files, a tar, or rows of a dataset."""

    kind: str
    paths: tuple[str, ...]
    rows: tuple[int, int] = (0, 0)


class SeedImagesStep(CrossStep):
    """See the module's docstring. `folders`: where the vectors of each set are."""

    name = "seed_images"

    def __init__(self, sets: Mapping[str, str], section: Section, by: str, store: Store) -> None:
        """`sets`: name to images; `by`: the pool's column of vectors. Raises PlanError."""
        self._sets = dict(sets)
        self._section = dumps({name: dict(entry) for name, entry in section.items() if not is_pool_count(entry)})
        self._by = by
        self.folders: dict[str, str] = {}
        if not self._sets:
            return
        scorer = _scorer_of(self._section, by)
        scorer.check()
        vectors = specs_of(scorer, [])[-1].fingerprint
        for name, images in self._sets.items():
            told = sha256(dumps([vectors, by, _listing(images, f"retrieve.sets.{name}.images")]).encode())
            self.folders[name] = f"_seeds/{told.hexdigest()[:16]}"

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every set has its vectors."""
        return all(store.exists(f"{folder}/rows.json") for folder in self.folders.values())

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Embed what is missing; images by set, and those without a vector."""
        counts: Counter[str] = Counter()
        for name, folder in self.folders.items():
            if store.exists(f"{folder}/rows.json"):
                continue
            sources = _pieces(self._sets[name])
            embed = OnDevice(partial(_embed, store, self._section, self._by, folder))
            rows, seen = [0] * len(sources), 0
            for number, vectors, images in map_items(embed, list(enumerate(sources))):
                rows[number] = vectors
                seen += images
            if not sum(rows):
                raise PlanError(f"retrieve.sets.{name}.images: {self._sets[name]} holds no image that can be embedded")
            store.put_json(f"{folder}/rows.json", {"rows": rows, "images": seen, "unusable": seen - sum(rows)})
            counts[f"images of {name}"] += seen
            counts["images without a vector"] += seen - sum(rows)
        return counts


def seed_images_step(sets: Mapping[str, str], section: Section, by: str, store: Store) -> SeedImagesStep:
    """The step for these sets. Raises PlanError for a set or a column that is not there, WeightsError for a model."""
    return SeedImagesStep(sets, section, by, store)


def _scorer_of(section: str, by: str) -> ImageScorer[Any]:
    for scorer in build(loads(section)):
        if isinstance(scorer, ImageScorer) and any(field.name == by for field in scorer.embeddings):
            return scorer
    raise PlanError(f"retrieve.sets: no image scorer of this recipe writes {by}; name files of `embeddings` instead")


@lru_cache(maxsize=1)
def _loaded(section: str, by: str) -> ImageScorer[Any]:
    scorer = _scorer_of(section, by)
    scorer.load(device_of(scorer))
    return scorer


def _embed(store: Store, section: str, by: str, folder: str, item: tuple[int, Source]) -> tuple[int, int, int]:
    """(number, vectors, images) of a piece."""
    number, source = item
    path = f"{folder}/{number:08d}.npz"
    if store.exists(path):  # by a run that was killed
        held = get_arrays(store, path)
        return number, len(held["vectors"]), int(held["images"])
    scorer, counts = _loaded(section, by), Counter[str]()
    scorer.begin()
    runner = Runner([scorer], [], counts)
    parts, images = [], 0
    with ThreadPoolExecutor(2, "curate-decode") as pool:
        for data in _batches(_images_of(source)):
            images += len(data)
            prepared = list(pool.map(lambda one: prepare([scorer], one, None), data))
            columns = runner.run(Chunk(len(data), list(range(len(data))), texts=[None] * len(data)), prepared)
            vectors, given = vectors_of(columns[by])
            parts.append(vectors[given])
    width = next(field.type.list_size for field in scorer.embeddings if field.name == by)
    whole = np.concatenate([np.empty((0, width), np.float16), *parts])
    put_arrays(store, path, vectors=whole, images=np.array(images))
    return number, len(whole), images


def _batches(images: Iterator[bytes]) -> Iterator[list[bytes]]:
    while batch := list(islice(images, CPU_ROWS)):
        yield batch


def _listing(images: str, place: str) -> Any:
    """What names a set's content: its files and their sizes, or the dataset. Raises PlanError where there is none."""
    if images.startswith(DATASETS):
        name = images.removeprefix(DATASETS).split(":")[0]
        if name and Path(name).is_dir():
            files = [file for file in sorted(Path(name).rglob("*")) if file.is_file()]
            return [images, [(file.relative_to(name).as_posix(), file.stat().st_size) for file in files]]
        if not OF_THE_HUB.fullmatch(name):
            raise PlanError(f"{place}: {images} is no folder; a dataset of the hub is {DATASETS}NAME@COMMIT[:SPLIT]")
        return images
    try:
        found = _files(images)
    except (OSError, ValueError, ImportError) as error:
        raise PlanError(f"{place}: {images} cannot be read: {error}") from None
    if not found:
        raise PlanError(f"{place}: no images at {images}; expected a folder of images, tars, or {DATASETS}NAME")
    return found


def _files(images: str) -> list[tuple[str, int]]:
    """(URL, bytes) of a folder's images, or of the tars."""
    fs, inner = fsspec.core.url_to_fs(images)
    tars = images.endswith(".tar")
    paths = fs.glob(inner) if tars else fs.find(inner)
    wanted = [path for path in paths if tars or PurePosixPath(path).suffix.lower() in SUFFIXES]
    return [(fs.unstrip_protocol(path), int(fs.size(path))) for path in sorted(wanted)]


def _pieces(images: str) -> list[Source]:
    if images.startswith(DATASETS):
        name, _, split = images.removeprefix(DATASETS).partition(":")
        rows = len(_dataset(name, split))
        spans = [(at, min(at + IMAGES_PER_ITEM, rows)) for at in range(0, rows, IMAGES_PER_ITEM)]
        return [Source("rows", (name, split), span) for span in spans]
    paths = [path for path, _ in _files(images)]
    if images.endswith(".tar"):
        return [Source("tar", (path,)) for path in paths]
    return [Source("files", tuple(paths[at : at + IMAGES_PER_ITEM])) for at in range(0, len(paths), IMAGES_PER_ITEM)]


def _images_of(source: Source) -> Iterator[bytes]:
    if source.kind == "rows":
        rows = _dataset(*source.paths)
        for number in range(*source.rows):
            yield _bytes_of(rows[number]["image"])
        return
    for path in source.paths:
        with fsspec.open(path, "rb") as handle:
            if source.kind == "files":
                yield handle.read()
                continue
            try:
                yield from _images_in(handle)
            except tarfile.TarError as error:
                raise PlanError(f"retrieve.sets: {path} is no whole tar: {error}; restore it") from None


def _images_in(handle: IO[bytes]) -> Iterator[bytes]:
    with tarfile.open(fileobj=handle, mode="r|") as archive:
        for member in archive:
            stream = archive.extractfile(member)
            if stream is not None and PurePosixPath(member.name).suffix.lower() in SUFFIXES:
                yield stream.read()


def _bytes_of(image: Mapping[str, Any] | None) -> bytes:
    """An image as `datasets` holds it, by its bytes or by its path; nothing for a null and for a path to nowhere."""
    if image is None:
        return b""
    data: bytes | None = image["bytes"]
    if data is None:
        path = Path(image["path"] or "")
        data = path.read_bytes() if path.is_file() else b""
    return data


@lru_cache(maxsize=1)
def _dataset(name: str, split: str) -> Any:
    """A split of a dataset with its one column of images, undecoded. Raises PlanError."""
    import datasets  # noqa: PLC0415  # heavy, and most sets are files

    saved = Path(name, "dataset_info.json").is_file() or Path(name, "dataset_dict.json").is_file()
    try:
        if saved:
            held = datasets.load_from_disk(name)
        elif Path(name).is_dir():
            held = datasets.load_dataset(name)
        else:
            hub, _, commit = name.rpartition("@")
            held = datasets.load_dataset(hub, revision=commit)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise PlanError(f"{DATASETS}{name} cannot be loaded: {error}") from None
    if isinstance(held, datasets.DatasetDict):
        if split not in held and (split or len(held) > 1):
            raise PlanError(f"{DATASETS}{name}: it has the splits {', '.join(held)}; write {DATASETS}{name}:SPLIT")
        held = held[split or next(iter(held))]
    columns = [column for column, kind in held.features.items() if isinstance(kind, datasets.Image)]
    if len(columns) != 1:
        raise PlanError(f"{DATASETS}{name}: expected one column of images, found {', '.join(columns) or 'none'}")
    plain = held.select_columns(columns).cast_column(columns[0], datasets.Image(decode=False))
    return plain if columns == ["image"] else plain.rename_column(columns[0], "image")

"""Sets of images as people have them: a folder, WebDataset tars, or a dataset of the library `datasets`.

    FOLDER                              its images, here or behind any fsspec URL
    ….tar                               WebDataset tars, by a path or pattern
    datasets:FOLDER[:SPLIT]             as `datasets` saves it or loads it from files
    datasets:NAME@COMMIT[:SPLIT]        of the hub

Bytes and names alone: nothing is decoded here, and a link in a tar is an image without bytes. It refuses sets without
images, a dataset with more than one column of images, and one of the hub that names no commit, since nobody could tell
when it changed.
"""

import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from curate.errors import PlanError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
DATASETS = "datasets:"
OF_THE_HUB = re.compile(r"[^@:]+@[0-9a-f]{40}")  # a branch or a tag may move
IMAGES_PER_PIECE = 1024  # of a folder or dataset; loading a model takes as long as 100 images on a CPU


@dataclass(frozen=True)
class Piece:
    """A part of a set: files, a tar, or rows of a dataset."""

    kind: str
    paths: tuple[str, ...]
    rows: tuple[int, int] = (0, 0)


def listing(images: str, place: str) -> Any:
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


def pieces(images: str) -> list[Piece]:
    """The set in parts that one worker takes. Raises PlanError for a dataset that cannot be loaded."""
    if images.startswith(DATASETS):
        name, _, split = images.removeprefix(DATASETS).partition(":")
        rows = len(_dataset(name, split))
        spans = [(at, min(at + IMAGES_PER_PIECE, rows)) for at in range(0, rows, IMAGES_PER_PIECE)]
        return [Piece("rows", (name, split), span) for span in spans]
    paths = [path for path, _ in _files(images)]
    if images.endswith(".tar"):
        return [Piece("tar", (path,)) for path in paths]
    return [Piece("files", tuple(paths[at : at + IMAGES_PER_PIECE])) for at in range(0, len(paths), IMAGES_PER_PIECE)]


def images_of(piece: Piece) -> Iterator[tuple[str, bytes]]:
    """(what names it in the set, bytes) of each image of a part; no bytes for a null. Raises PlanError."""
    if piece.kind == "rows":
        rows = _dataset(*piece.paths)
        for number in range(*piece.rows):
            yield f"{DATASETS}{':'.join(filter(None, piece.paths))}#{number}", _bytes_of(rows[number]["image"])
        return
    for path in piece.paths:
        with _open(path) as handle:
            if piece.kind == "files":
                yield _printable(path), handle.read()
                continue
            try:
                for name, data in _images_in(handle):
                    yield _printable(f"{path}#{name}"), data
            except tarfile.TarError as error:
                raise PlanError(f"{path} is no whole tar: {error}; restore it") from None


def _open(path: str) -> IO[bytes]:
    """A file that `_files` named; a local one as it is called, for "::" in a URL means a file system inside another."""
    local = path.startswith("file://")
    opened = LocalFileSystem().open(path, "rb") if local else fsspec.open(path, "rb").open()
    return cast(IO[bytes], opened)


def _printable(name: str) -> str:
    """A name as text: what is no UTF-8 in it is spelled out."""
    return name.encode("utf-8", "backslashreplace").decode()


def _images_in(handle: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=handle, mode="r|") as archive:
        for member in archive:
            if PurePosixPath(member.name).suffix.lower() not in SUFFIXES:
                continue
            stream = archive.extractfile(member) if member.isfile() else None  # a stream cannot go back to a link's end
            if stream is not None or member.issym() or member.islnk():
                yield member.name, stream.read() if stream is not None else b""


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

"""The weights manifest: every model file that a scorer can ask for, by name, source, sha256, size, licence and input.

A file is looked for in this order, and known by its sha256 whatever its name or subfolder:
    $CURATE_WEIGHTS          one or more folders (separated as PATH is), read only
    the cache folder         where `curate weights pull` puts files
    the Hugging Face cache   for entries that come from the hub, whose own hashes the hub's client checks

Nothing is downloaded but by `pull`. Entries without sha256 come from the hub, or were published without one: those are
known by their file name, and by what was first pulled.
"""

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from curate.errors import WeightsError
from curate.score.weight_files import cache_folder, files_below, sha256_of
from curate.score.weight_manifest import MANIFEST, Weight

CHUNK_BYTES = 1 << 20
# No pickles: transformers prefers safetensors where both are.
TRANSFORMERS_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Held:
    """An entry of the manifest and where its file is on this machine, if anywhere."""

    weight: Weight
    path: Path | None


def named(name: str) -> Weight:
    """The entry of this name. Raises WeightsError with the names there are."""
    if name not in MANIFEST:
        raise WeightsError(f"no weights {name!r} in the manifest; `curate weights ls` shows {', '.join(MANIFEST)}")
    return MANIFEST[name]


def by_clip_tag(model: str, pretrained: str) -> Weight | None:
    """The entry of an open_clip model and tag; None for those that the manifest does not list."""
    wanted = f"{model}:{pretrained}"
    return next((weight for weight in MANIFEST.values() if wanted in weight.clip_tags), None)


def find(weight: Weight) -> Path | None:
    """The file on this machine, or None. Reads no file but to hash one of the right size."""
    if weight.sha256 is not None:
        for folder in folders():
            for file in _candidates(folder, weight):
                if sha256_of(file) == weight.sha256:
                    return file
    elif weight.url is not None:
        alike = (file for folder in folders() for file in files_below(folder) if file.name == weight.file_name)
        return next(alike, None)
    return in_hub_cache(*weight.hub) if weight.hub is not None else None


def require(name: str, where: str) -> Path:
    """The file of a named entry. Raises WeightsError with the command that gets it; `where` is what asks."""
    found = find(named(name))
    if found is None:
        raise WeightsError(
            f"{where}: {name} is not on this machine; `curate weights pull {name}`, or set CURATE_WEIGHTS to a folder "
            "that holds it"
        )
    return found


def in_hub_cache(repository: str, file: str) -> Path | None:
    """A file of a hub repository in the local Hugging Face cache."""
    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None


def folders() -> list[Path]:
    """Where files are looked for by content."""
    given = [Path(part).expanduser() for part in os.environ.get("CURATE_WEIGHTS", "").split(os.pathsep) if part]
    return [folder for folder in (*given, _pulled()) if folder.is_dir()]


def ls() -> list[Held]:
    """Every entry and where its file is."""
    return [Held(weight, find(weight)) for weight in MANIFEST.values()]


def check(names: Sequence[str] = ()) -> list[tuple[Weight, str]]:
    """(entry, `ok`, `missing` or `wrong content`) of the named entries, or of all.

    A file that bears an entry's published name and has other content is `wrong content`.
    """
    return [(weight, _state(weight)) for weight in ([named(name) for name in names] or MANIFEST.values())]


def pull(names: Iterable[str], on_bytes: Callable[[int, int | None], None] = lambda done, total: None) -> list[Path]:
    """Download the named entries that are not here; resumes, and verifies sha256.

    `on_bytes(done, total)` is told of progress. Raises WeightsError when a source cannot be reached, an entry has no
    public source, or the content is not the published one.
    """
    return [find(weight) or _download(weight, on_bytes) for weight in [named(name) for name in names]]


def _state(weight: Weight) -> str:
    if find(weight) is not None:
        return "ok"
    alike = (file for folder in folders() for file in files_below(folder) if file.name == weight.file_name)
    return "wrong content" if next(alike, None) else "missing"


def _candidates(folder: Path, weight: Weight) -> Iterator[Path]:
    for file in files_below(folder):
        if weight.size_bytes is None or file.stat().st_size == weight.size_bytes:
            yield file


def _pulled() -> Path:
    return cache_folder() / "weights"


def _download(weight: Weight, on_bytes: Callable[[int, int | None], None]) -> Path:
    if weight.hub is not None:
        try:
            if weight.whole:
                snapshot_download(weight.hub[0], allow_patterns=list(TRANSFORMERS_FILES))
            return Path(hf_hub_download(*weight.hub))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise WeightsError(f"{weight.name}: {weight.source} could not be had: {_first_line(error)}") from None
    if weight.url is None:
        raise WeightsError(f"{weight.name}: no public source; {weight.source}")
    target = _pulled() / weight.name / weight.file_name
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(weight.url, part, on_bytes)
    except (OSError, urllib.error.URLError) as error:
        raise WeightsError(
            f"{weight.name}: {weight.url} could not be had: {_first_line(error)}; run the command again to resume"
        ) from None
    found = sha256_of(part)
    if weight.sha256 is not None and found != weight.sha256:
        part.unlink()
        raise WeightsError(f"{weight.name}: {weight.url} gave sha256 {found}, the manifest has {weight.sha256}")
    part.replace(target)
    return target


def _fetch(url: str, part: Path, on_bytes: Callable[[int, int | None], None]) -> None:
    """Append what is missing of `part`; a server without ranges starts it again."""
    done = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": "curate-weights", **({"Range": f"bytes={done}-"} if done else {})}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing left to send: the part is whole, or it is not this file's
            return
        raise
    with response, part.open("ab" if response.status == 206 else "wb") as handle:
        done = handle.tell()
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        while block := response.read(CHUNK_BYTES):
            handle.write(block)
            done += len(block)
            on_bytes(done, total)
        if total is not None and done < total:
            raise OSError(f"the connection ended after {done} of {total} bytes")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""The weights manifest: every model file that a scorer can ask for, by name, source, sha256, size, licence and input.

A file is looked for in this order, and known by its sha256 whatever its name or subfolder:
    $CURATE_WEIGHTS          one or more folders (separated as PATH is), read only
    the cache folder         where `curate weights pull` puts files
    the Hugging Face cache   for entries that come from the hub, whose own hashes the hub's client checks

Nothing is downloaded but by `pull`. A file that was published without a sha256 is pinned by its first pull (FILE.sha256
beside it), and from then on known by that content. Where nothing was pulled, a file of the published name in a folder
that the user gave is taken at the user's word: `unverified`, with its sha256 in every table's identity.
"""

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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
    known = weight.sha256 or _pin(weight)
    if known is not None:
        held = (file for folder in folders() for file in _candidates(folder, weight))
        cached = in_hub_cache(*weight.hub) if weight.hub is not None else None
        return next((file for file in chain(held, [cached] if cached else []) if sha256_of(file) == known), None)
    if weight.url is not None:
        return next(_namesakes(weight), None)
    return in_hub_cache(*weight.hub) if weight.hub is not None else None


def require(name: str, where: str) -> Path:
    """The file of a named entry. Raises WeightsError with the command that gets it; `where` is what asks."""
    found = find(named(name))
    if found is None:
        weight = named(name)
        how = f"`curate weights pull {name}`" if weight.url or weight.hub else weight.note
        own = "set CURATE_WEIGHTS to its folder" if weight.sha256 or weight.url else "name a file of your own"
        lost = [str(folder) for folder in _given() if not folder.is_dir()]
        told = f" (CURATE_WEIGHTS: no folder {', '.join(lost)})" if lost else ""
        raise WeightsError(f"{where}: {name} is not on this machine; {how}, or {own}{told}")
    return found


def in_hub_cache(repository: str, file: str) -> Path | None:
    """A file of a hub repository in the local Hugging Face cache."""
    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None


def folders() -> list[Path]:
    """Where files are looked for by content."""
    return [folder for folder in (*_given(), _pulled()) if folder.is_dir()]


def _given() -> list[Path]:
    return [Path(part).expanduser() for part in os.environ.get("CURATE_WEIGHTS", "").split(os.pathsep) if part]


def ls() -> list[Held]:
    """Every entry and where its file is."""
    return [Held(weight, find(weight)) for weight in MANIFEST.values()]


def check(names: Sequence[str] = ()) -> list[tuple[Weight, str]]:
    """(entry, `ok`, `unverified`, `missing` or `wrong content`) of the named entries, or of all.

    `wrong content`: a file of the published name and other content. `unverified`: no content is known to compare with.
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
        return "ok" if weight.sha256 or weight.hub or _pin(weight) else "unverified"
    return "wrong content" if next(_namesakes(weight), None) else "missing"


def _namesakes(weight: Weight) -> Iterator[Path]:
    return (file for folder in folders() for file in files_below(folder) if file.name == weight.file_name)


def _pin(weight: Weight) -> str | None:
    """The content that was first pulled, of a file whose sha256 nobody published."""
    if weight.sha256 is not None or weight.url is None:
        return None
    pin = _pin_file(weight)
    return pin.read_text().strip() if pin.is_file() else None


def _pin_file(weight: Weight) -> Path:
    target = _target(weight)
    return target.with_name(f"{target.name}.sha256")


def _target(weight: Weight) -> Path:
    return _pulled() / weight.name / weight.file_name


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
        raise WeightsError(f"{weight.name}: not to be had as a file: {weight.note}")
    target = _target(weight)
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(weight.url, part, on_bytes)
    except (OSError, urllib.error.URLError) as error:
        raise WeightsError(
            f"{weight.name}: {weight.url} could not be had: {_first_line(error)}; run the command again to resume"
        ) from None
    found = sha256_of(part)
    known = weight.sha256 or _pin(weight)
    if known is not None and found != known:
        part.unlink()
        whose = "the manifest has" if weight.sha256 else f"{_pin_file(weight)}, of the first pull, has"
        raise WeightsError(f"{weight.name}: {weight.url} gave sha256 {found}, {whose} {known}")
    if known is None:
        _pin_file(weight).write_text(f"{found}\n")
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

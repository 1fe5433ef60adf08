"""Files known by their content: sha256 of weights, remembered by (path, size, modification time).

Hashing 900 MB takes a second or two and plans must be quick, so hashes are kept in the user's cache folder; a file that
was replaced has another size or time. Refuses to trust a name.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

CACHE_NAME = "sha256.json"


def cache_folder() -> Path:
    """`$CURATE_CACHE`, else `curate` in the user's cache folder."""
    given = os.environ.get("CURATE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "curate"


def sha256_of(path: Path) -> str:
    """sha256 of a file, lower-case hex. Raises OSError when it cannot be read."""
    stat = path.stat()
    entry = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    remembered = _remembered()
    if entry in remembered:
        return remembered[entry]
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    _remember(entry, found)
    return found


def sha256_of_folder(folder: Path) -> str:
    """One hash over the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for file in files_below(folder):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def files_below(folder: Path) -> Iterator[Path]:
    """Every plain file below a folder, in name order; hidden ones left out."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def _remembered() -> dict[str, str]:
    try:
        found = json.loads((cache_folder() / CACHE_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(entry: str, found: str) -> None:
    folder = cache_folder()
    temporary = folder / f".{CACHE_NAME}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(_remembered() | {entry: found}, indent=0, sort_keys=True))
        temporary.replace(folder / CACHE_NAME)
    except OSError:
        return  # a read-only home only costs time

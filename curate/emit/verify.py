"""A release read again, all of it: every tar against `release.json`, every sample against the manifest.

It trusts nothing but `release.json`, once its seal fits, needs no table of the run, and changes nothing.
"""

import hashlib
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow.parquet as pq

from curate.emit.provenance import SEAL, seal_of
from curate.errors import ReleaseError
from curate.store import Store

RELEASES = "releases"
NOTE = "release.json"
WITHDRAWN = "withdrawn.json"  # beside it, when samples were taken back
SHOWN = 20  # differences told in the error; the count tells of the rest
_SIDE_FILES = ("manifest.parquet", "README.md", NOTE)


@dataclass
class Report:
    """What was read, and every difference found."""

    subsets: int = 0
    tars: int = 0
    samples: int = 0
    bytes: int = 0
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = f"{self.tars:,} tars of {self.subsets} subsets ({self.bytes / 1e6:,.1f} MB)"
        return f"{self.samples:,} samples in {where}: all as the manifest says"

    __rich__ = __str__


def verify_release(store_root: str, name: str, on_progress: Callable[[int, int], None] | None = None) -> Report:
    """Compare every byte of `<store_root>/releases/<name>` with what it says of itself.

    `on_progress` is called after each tar with (tars read, tars in all).
    Raises ReleaseError that lists the differences, or says that there is no such release.
    """
    store = Store(store_root)
    folder = f"{RELEASES}/{name}"
    release = store.get_json(f"{folder}/{NOTE}")
    if release is None:
        raise ReleaseError(f"{store.url(folder)}: no {NOTE}: not a release, or one that was never finished")
    refuse_withdrawn(store, folder)
    if not isinstance(release, dict) or release.get(SEAL) != seal_of(release):  # else nothing can be compared with it
        raise ReleaseError(f"{store.url(folder)}/{NOTE} was changed since it was written: its seal does not fit")
    report = Report(subsets=len(release["subsets"]))
    _check_sum(store, f"{folder}/manifest.parquet", release["manifest"]["sha256"], report)
    _check_sum(store, f"{folder}/README.md", release["card"]["sha256"], report)
    _check_names(store, folder, {*_SIDE_FILES, *release["subsets"]}, report)
    rows = _manifest(store, f"{folder}/manifest.parquet", report)
    total = sum(facts["tars"] for facts in release["subsets"].values())
    for subset, facts in release["subsets"].items():
        _check_subset(store, f"{folder}/{subset}", facts, report)
        prefixes: list[np.ndarray] = []
        for file in facts["files"]:
            expected = next(rows, [])
            _check_tar(store, f"{folder}/{subset}/{file['name']}", subset, file, expected, prefixes, report)
            report.tars += 1
            if on_progress is not None:
                on_progress(report.tars, total)
        different = len(np.unique(np.concatenate(prefixes))) if prefixes else 0
        if different != facts["samples"]:
            report.differences.append(f"{subset}: {different} different keys, {facts['samples']} samples expected")
    if next(rows, None) is not None:
        report.differences.append("manifest.parquet: has rows of tars that release.json does not know")
    if report.differences:
        more = len(report.differences) - SHOWN
        lines = report.differences[:SHOWN] + ([f"… and {more} more"] if more > 0 else [])
        raise ReleaseError(f"{store.url(folder)} is not what it says it is:\n" + "\n".join(lines))
    return report


def refuse_withdrawn(store: Store, folder: str) -> None:
    """Raise ReleaseError when samples of this release were taken back, with the release to use instead."""
    note = store.get_json(f"{folder}/{WITHDRAWN}" if folder else WITHDRAWN)
    if note is not None:
        instead = f"use {RELEASES}/{note['use']}" if note["use"] else "run the recipe again"
        raise ReleaseError(f"{store.url(folder).rstrip('/')} was withdrawn: {note['reason']}; {instead}")


def _manifest(store: Store, path: str, report: Report) -> Iterator[list[dict[str, Any]]]:
    """The manifest's rows, tar by tar: a row group is a tar."""
    try:
        with store.open(path) as handle, pq.ParquetFile(handle) as file:
            for number in range(file.metadata.num_row_groups):
                columns = ["subset", "key", "tar", "offset", "length", "member_sha256"]
                yield file.read_row_group(number, columns=columns).to_pylist()
    except FileNotFoundError:
        report.differences.append("manifest.parquet: not there")
    except (OSError, ValueError) as error:
        report.differences.append(f"manifest.parquet: unreadable: {error}")


def _check_subset(store: Store, folder: str, facts: Mapping[str, Any], report: Report) -> None:
    sizes = {file["name"]: file["samples"] for file in facts["files"]}
    if store.get_json(f"{folder}/sizes.json") != sizes:
        report.differences.append(f"{folder}/sizes.json: not the numbers of release.json")
    try:
        length = store.get_bytes(f"{folder}/__len__").decode(errors="replace")
    except FileNotFoundError:
        length = "missing"
    if length != str(facts["samples"]):
        report.differences.append(f"{folder}/__len__: {length}, {facts['samples']} expected")
    _check_names(store, folder, {*sizes, "sizes.json", "__len__"}, report)


def _check_names(store: Store, folder: str, expected: set[str], report: Report) -> None:
    found = set(store.names(folder))
    for name in sorted(found - expected):
        report.differences.append(f"{folder}/{name}: not part of the release")
    for name in sorted(expected - found):
        report.differences.append(f"{folder}/{name}: missing")


def _check_sum(store: Store, path: str, expected: str, report: Report) -> None:
    try:
        with store.open(path) as handle:
            found = hashlib.sha256()
            while block := handle.read(2**20):
                found.update(block)
    except FileNotFoundError:
        return  # told with the names
    if found.hexdigest() != expected:
        report.differences.append(f"{path}: sha256 {found.hexdigest()}, {expected} expected")


def _check_tar(
    store: Store, path: str, subset: str, file: Mapping[str, Any], expected: list[dict[str, Any]],
    prefixes: list[np.ndarray], report: Report,
) -> None:  # fmt: skip
    wrong = [row["key"] for row in expected if row["tar"] != file["name"] or row["subset"] != subset]
    if wrong or len(expected) != file["samples"]:
        report.differences.append(
            f"{path}: the manifest has {len(expected) - len(wrong)} rows of it, not {file['samples']}"
        )
    places = {row["offset"]: row for row in expected}
    seen: set[str] = set()
    known: list[str] = []  # the manifest's keys of these members: a member may be called anything
    try:
        with store.open(path) as handle:
            stream = _Hashing(handle)
            with tarfile.open(fileobj=cast(Any, stream), mode="r|") as archive:
                for info in archive:
                    key, _, suffix = info.name.partition(".")
                    row = places.pop(info.offset_data, None)
                    if row is not None:
                        _check_member(archive, info, row, path, report)
                        if key in seen:
                            report.differences.append(f"{path}: key {key} twice")
                        seen.add(key)
                        known.append(row["key"])
                    elif key not in seen or suffix in ("jpg", "png", "webp"):
                        report.differences.append(f"{path}: member {info.name} is not in the manifest")
            stream.drain()
    except FileNotFoundError:
        return  # told with the names
    except (tarfile.TarError, OSError) as error:
        report.differences.append(f"{path}: not a whole tar: {error}")
        return
    # 8 bytes a key: a subset of 100 million is checked for twins in a GB.
    prefixes.append(np.array([int(key[:16], 16) for key in known], dtype=np.uint64))
    for row in places.values():
        report.differences.append(f"{path}: the manifest has {row['key']} at {row['offset']}, no member is there")
    if (stream.hexdigest(), stream.bytes) != (file["sha256"], file["bytes"]):
        report.differences.append(
            f"{path}: sha256 {stream.hexdigest()} of {stream.bytes} bytes, {file['sha256']} expected"
        )
    report.samples += file["samples"]
    report.bytes += stream.bytes


def _check_member(
    archive: tarfile.TarFile, info: tarfile.TarInfo, row: Mapping[str, Any], path: str, report: Report
) -> None:
    data = archive.extractfile(info)
    found = hashlib.sha256(data.read() if data else b"").hexdigest()
    if info.name.partition(".")[0] != row["key"] or info.size != row["length"] or found != row["member_sha256"]:
        report.differences.append(f"{path}: {info.name} is not the {row['key']} of the manifest")


class _Hashing:
    """Reads a stream forward and remembers its sha256 and length."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest = stream, hashlib.sha256()
        self.bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        self.bytes += len(data)
        return data

    def drain(self) -> None:
        while self.read(2**20):
            pass

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

"""The words about releases: `verify`, `remove`, `export`. `curate.cli` guards and registers them.

Thin: what they do stands in `curate.emit`, which is loaded only when one of them is used.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from curate.errors import PlanError
from curate.store import Store

out = Console(width=None if sys.stdout.isatty() else 160, emoji=False)
Release = Annotated[str, typer.Argument(help="ROOT/releases/NAME, or a root (its latest release).")]
ListFile = Annotated[str | None, typer.Option(metavar="FILE", help="A file or URL, an entry a line.")]


class Form(StrEnum):
    """What a release can be exported as."""

    coyo = "coyo"
    laion = "laion"
    datacomp = "datacomp"
    urls = "urls"
    entries = "entries"
    croissant = "croissant"
    datasets = "datasets"
    metaclip = "metaclip"


def verify(release: Release) -> None:
    """Read every tar of a release again and compare it with the manifest. Exit code 2 when anything differs."""
    from curate.emit.verify import verify_release  # noqa: PLC0415  # only here

    root, name = release_of(release)
    report = verify_release(root, name)
    out.print(f"{root}/releases/{name}: {report}", markup=False, soft_wrap=True)


def remove(
    root: Annotated[str, typer.Argument(help="Root of a run: a folder or URL.")],
    keys: ListFile = None,
    urls: ListFile = None,
    domains: Annotated[str | None, typer.Option(metavar="FILE", help="With their subdomains.")] = None,
    hashes: Annotated[
        str | None, typer.Option(metavar="FILE", help="SHA-256 of the bytes as served or as emitted.")
    ] = None,
    phashes: Annotated[str | None, typer.Option(metavar="FILE", help="Perceptual hashes, 16 hex digits.")] = None,
    phash_radius: Annotated[
        int, typer.Option(help="Bits that a picture may differ from a listed pHash.", min=0, max=16)
    ] = 4,
) -> None:
    """Take samples back: erase them from the store and its releases, and never let them return.

    The latest release gets a successor without them; every release that held one is withdrawn. A killed removal is
    finished by the same command. Without lists, earlier removals are applied to what came since. Runs at this root
    must have ended, and wait until this has.
    """
    from curate.emit.takeback import Lists, lines_of, take_back  # noqa: PLC0415  # only here

    store = Store(root)
    store.check(writable=True)
    files = {"keys": keys, "urls": urls, "domains": domains, "hashes": hashes, "phashes": phashes}
    lists = Lists(
        **{name: lines_of(file) for name, file in files.items() if file is not None}, phash_radius=phash_radius
    )
    report = take_back(store, lists, lambda words: out.print(words, markup=False))
    out.print(str(report), markup=False, soft_wrap=True)


def export(
    release: Release,
    form: Annotated[Form, typer.Option("--as", help="The form; entries is DINOv2's, urls has no images and captions.")],
    out_folder: Annotated[Path, typer.Option("--out", help="A folder of this machine.")],
    subset: Annotated[str | None, typer.Option(help="One subset; all when there is only one.")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload a datasets folder to this Hub repository as well.")
    ] = None,
) -> None:
    """Write a release, without copying a picture, in the form that another tool reads.

    Example: `curate export out/run --as coyo --subset good --out coyo/`
    """
    from curate.emit.exports import EXPORTS, only_subset  # noqa: PLC0415  # only here
    from curate.emit.hub import push_to_hub  # noqa: PLC0415

    root, name = release_of(release)
    folder = f"{root}/releases/{name}"
    store = Store(root)
    if store.is_local and out_folder.resolve().is_relative_to(Path(store.full("")).resolve()):
        raise PlanError(
            f"--out {out_folder}: lies in {root}, which holds a run and nothing else; choose another folder"
        )
    if push is not None and form is not Form.datasets:
        raise PlanError("--push: uploads what --as datasets describes; write --as datasets")
    path = EXPORTS[form.value](folder, only_subset(folder, subset), out_folder)
    out.print(f"wrote {path}", markup=False, soft_wrap=True)
    if push is not None:
        out.print(f"pushed to {push_to_hub(path, push)}", markup=False, soft_wrap=True)


def latest(store: Store) -> str | None:
    """The name of the newest release."""
    try:
        return store.get_bytes("releases/latest").decode(errors="replace").strip()
    except FileNotFoundError:
        return None


def release_of(release: str) -> tuple[str, str]:
    """(root, name) of a release as people name it. Raises PlanError."""
    trimmed = release.rstrip("/")
    if "/releases/" in trimmed:
        root, _, name = trimmed.rpartition("/releases/")
        return root, name if name != "latest" else (latest(Store(root)) or "latest")
    newest = latest(Store(trimmed))
    if newest is None:
        raise PlanError(f"{release}: no release here; expected <root>/releases/<name> or a root that has one")
    return trimmed, newest

"""A subset as a dataset of the Hugging Face Hub: a folder that `datasets` reads, and its upload.

The folder holds the card, the subset's tars (hard links where the disk has them), its numbers and Croissant. Uploading
needs `huggingface_hub` and a token that its own login or HF_TOKEN provides; nothing is uploaded unless asked for.
"""

import os
import shutil
from pathlib import Path

import yaml

from curate.emit.croissant import export_croissant
from curate.emit.verify import refuse_withdrawn
from curate.errors import PlanError
from curate.store import Store


def export_datasets(release: str, subset: str, out: Path) -> Path:
    """`<out>/README.md`, `croissant.json`, `<subset>/*.tar`: `datasets.load_dataset(<out>)`. Raises PlanError.

    Tars of an earlier export that this release does not have are deleted: samples may have been taken back since.
    """
    store = Store(release)
    refuse_withdrawn(store, "")
    export_croissant(release, subset, out)
    (out / "README.md").write_text(_card(store.get_bytes("README.md").decode(), subset), encoding="utf-8")
    (out / subset).mkdir(parents=True, exist_ok=True)
    names = store.names(subset)
    for name in names:
        _place(store, f"{subset}/{name}", out / subset / name)
    for stale in (out / subset).glob("*.tar"):
        if stale.name not in names:
            stale.unlink()
    _place(store, "release.json", out / "release.json")
    return out


def push_to_hub(folder: Path, repository: str, *, endpoint: str | None = None, private: bool = True) -> str:
    """Upload an exported folder as a dataset repository, made when it is not there; returns its URL.

    Raises PlanError when the Hub refuses, with its words.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  # only when something is uploaded
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    api = HfApi(endpoint=endpoint)
    try:
        made = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, repo_type="dataset", folder_path=str(folder), commit_message="A release of curate"
        )
    except (HfHubHTTPError, OSError) as error:
        raise PlanError(f"--push {repository}: {error}; log in with `hf auth login` or set HF_TOKEN") from None
    return str(made)


def _card(text: str, subset: str) -> str:
    """The release's card with the front matter of one subset."""
    _, front, body = text.split("---\n", maxsplit=2)
    matter = yaml.safe_load(front)
    for part in ("configs", "dataset_info"):
        if part in matter:
            matter[part] = [entry for entry in matter[part] if entry["config_name"] == subset]
    if not matter.get("configs"):
        raise PlanError(f"{subset} is empty: there is nothing to load")
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n{body}"


def _place(store: Store, path: str, target: Path) -> None:
    if target.exists():
        target.unlink()
    if store.is_local:
        try:
            os.link(store.full(path), target)
            return
        except OSError:
            pass  # another disk, or one without hard links
    with store.open(path) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 2**20)

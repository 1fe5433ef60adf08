"""What a release tells about itself: `release.json`, without secrets and without anything that differs between two
undisturbed runs (no times, no hosts, no root, no number of workers). Its seal is the sum of all the rest of it.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from curate.config import EmitSettings, Recipe
from curate.emit.shuffle import Group
from curate.schema import Shard, TableSpec, pool_digest

FORMAT = 1
SEAL = "sha256"
_PACKAGES = ("curate", "datasets", "duckdb", "numpy", "onnxruntime", "open_clip_torch", "pillow", "pyarrow", "ray",
             "timm", "torch", "transformers")  # fmt: skip
_SECRET = re.compile(r"secret|token|password|passwd|credential|api_?key|access_?key|signature", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(?<=://)([^?\s]*)\?\S+")
_OF_ONE_RUN = ("root", "engine")  # where it ran, not what it made


def without_secrets(value: Any, name: str = "") -> Any:
    """The same JSON with secrets as `***`: values under telling keys, user names and queries in URLs."""
    if isinstance(value, Mapping):
        return {key: without_secrets(part, str(key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(part, name) for part in value]
    if isinstance(value, str):
        if _SECRET.search(name):
            return "***"
        return _QUERY.sub(r"\1?***", _USERINFO.sub("", value))
    return value


def recipe_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it goes into a release."""
    tree = recipe.model_dump(mode="json", exclude=set(_OF_ONE_RUN))
    found: dict[str, Any] = without_secrets(tree)
    return found


def seal_of(release: Mapping[str, Any]) -> str:
    """SHA-256 of all of a `release.json` but its seal: `curate verify` finds what was changed in it by hand."""
    rest = json.loads(json.dumps({name: value for name, value in release.items() if name != SEAL}))  # keys are strings
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages that make or judge samples."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def release_note(
    fingerprint: str,
    recipe: Recipe,
    settings: EmitSettings,
    tables: Sequence[TableSpec],
    shards: Sequence[Shard],
    set_aside: Mapping[str, str],
    sources: Any,
    subsets: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything but the sums of the files, which the step adds."""
    return {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "recipe": recipe_of(recipe),
        "emit": settings.model_dump(mode="json"),
        "tables": {
            spec.name: {
                "fingerprint": spec.fingerprint, "version": spec.version,
                "settings": without_secrets(dict(spec.settings)), "inputs": dict(spec.inputs),
                "columns": {field.name: str(field.type) for field in spec.schema},
            }
            for spec in tables
        },
        "pool": {
            "digest": pool_digest(shards), "shards": len(shards), "rows": sum(shard.rows for shard in shards),
        },
        "set_aside": dict(set_aside),
        "sources": without_secrets(sources),
        "subsets": dict(subsets),
        "versions": versions(),
    }  # fmt: skip


def subset_note(
    recipe: Recipe, spec: TableSpec, threshold: float | None, picked: Mapping[str, Any], groups: Sequence[Group],
    files: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """One subset in `release.json`. `clauses` counts refused rows by the first clause that refused them."""
    name = spec.name.removeprefix("member_")
    settings = recipe.subsets[name]
    return {
        "where": settings.where,
        "keep_top": settings.keep_top.model_dump(mode="json") if settings.keep_top else None,
        "threshold": threshold if threshold is not None and math.isfinite(threshold) else None,
        "fingerprint": spec.fingerprint,
        "samples": picked["samples"],
        "without_text": picked["without_text"],
        "refused": dict(picked["clauses"]),
        "tars": len(files),
        "bytes": sum(file["bytes"] for file in files),
        "shuffle": {"groups": len(groups), "exact": len(groups) <= 1},
        "files": [
            {"name": f["tar"], "samples": f["samples"], "bytes": f["bytes"], "sha256": f["sha256"]} for f in files
        ],
    }

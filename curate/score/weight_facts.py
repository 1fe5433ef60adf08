"""Which published model files stand behind tables, and under which licences: what a release says of them.

Read from the tables' settings alone, where scorers leave the sha256 of their files or the published names of models.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from curate.schema import TableSpec
from curate.score.weight_manifest import MANIFEST, Weight
from curate.score.weights import by_clip_tag

_SHA256 = re.compile(r"[0-9a-f]{64}")


def weights_behind(tables: Sequence[TableSpec]) -> list[dict[str, Any]]:
    """Rows {table, name, sha256, licence, source}, in table order; name and licence are null for a file of your own."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for spec in tables:
        tag = _tagged(spec.settings)
        for digest in _digests(spec.settings):
            weight = next((weight for weight in MANIFEST.values() if weight.sha256 == digest), tag)
            found[spec.name, digest] = _row(spec.name, weight, digest)
        if tag is not None and not any(table == spec.name for table, _ in found):
            found[spec.name, ""] = _row(spec.name, tag, tag.sha256)
    return list(found.values())


def _tagged(settings: Mapping[str, Any]) -> Weight | None:
    model, pretrained = settings.get("model"), settings.get("pretrained")
    return by_clip_tag(model, pretrained) if isinstance(model, str) and isinstance(pretrained, str) else None


def _row(table: str, weight: Weight | None, digest: str | None) -> dict[str, Any]:
    return {
        "table": table, "name": weight.name if weight else None, "sha256": digest,
        "licence": weight.licence if weight else None, "source": weight.source if weight else None,
    }  # fmt: skip


def _digests(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if _SHA256.fullmatch(value):
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _digests(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _digests(part)

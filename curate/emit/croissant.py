"""A release described in Croissant 1.0 (mlcommons.org/croissant): files with their sha256, columns with their types.

JSON-LD written from `release.json` and the manifest's schema; it says nothing that these do not. Read back with
mlcroissant 1.1: no error, all rows of the manifest, all pictures.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate.errors import PlanError
from curate.store import Store

# Terms of Croissant 1.0. `containedIn` is schema.org's there: it must not be among them.
_TERMS = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet", "format",
    "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex",
    "repeated", "replace", "samplingRate", "separator", "source", "subField", "transform",
)  # fmt: skip
CONTEXT: Mapping[str, Any] = {
    "@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/", "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/", "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"}, "examples": {"@id": "cr:examples", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"}, **{term: f"cr:{term}" for term in _TERMS},
}  # fmt: skip


def export_croissant(release: str, subset: str, out: Path) -> Path:
    """`<out>/croissant.json` of one subset; URLs in it are relative to the release. Raises PlanError."""
    store = Store(release)
    note = store.get_json("release.json")
    if note is None or subset not in note["subsets"]:
        known = ", ".join(note["subsets"]) if note else "no release.json is there"
        raise PlanError(f"{release}: no subset {subset} ({known})")
    with store.open("manifest.parquet") as handle, pq.ParquetFile(handle) as file:
        schema = file.schema_arrow
    out.mkdir(parents=True, exist_ok=True)
    path = out / "croissant.json"
    text = json.dumps(croissant(note, subset, schema), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def croissant(note: Mapping[str, Any], subset: str, schema: pa.Schema) -> dict[str, Any]:
    """The JSON-LD tree: the manifest's rows, and the images of the tars, joined by key."""
    facts = note["subsets"][subset]
    condition = f" where {facts['where']}" if facts["where"] else ""
    tars = [
        _file(f"{subset}/{file['name']}", "application/x-tar", file["sha256"], file["bytes"]) for file in facts["files"]
    ]
    names = ["*.jpg"] if note["emit"]["image_names"] == "jpg" else ["*.jpg", "*.png", "*.webp"]
    images = {
        "@type": "cr:FileSet", "@id": "images", "encodingFormat": "image/jpeg", "includes": names,
        "containedIn": [{"@id": tar["@id"]} for tar in tars],
    }  # fmt: skip
    columns = [field for field in schema if field.name not in ("offset", "length")]
    return {
        "@context": dict(CONTEXT), "@type": "sc:Dataset", "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"{subset}-{note['fingerprint'][:8]}", "version": f"1.0.0+{note['fingerprint']}",
        "description": f"{facts['samples']:,} samples of a pool of {note['pool']['rows']:,} rows{condition}.",
        "distribution": [
            _file("manifest.parquet", "application/x-parquet", note["manifest"]["sha256"], None), *tars, images,
        ],
        "recordSet": [
            {"@type": "cr:RecordSet", "@id": "samples", "key": {"@id": "samples/key"},
             "field": [_column(field) for field in columns]},
            {"@type": "cr:RecordSet", "@id": "pictures", "key": {"@id": "pictures/key"}, "field": [
                {"@type": "cr:Field", "@id": "pictures/key", "dataType": "sc:Text",
                 "references": {"field": {"@id": "samples/key"}},
                 "source": {"fileSet": {"@id": "images"}, "extract": {"fileProperty": "filename"},
                            "transform": {"regex": "^([0-9a-f]{32})"}}},  # some readers give the name without its end
                {"@type": "cr:Field", "@id": "pictures/image", "dataType": "sc:ImageObject",
                 "source": {"fileSet": {"@id": "images"}, "extract": {"fileProperty": "content"}}},
            ]},
        ],
    }  # fmt: skip


def _file(path: str, kind: str, sha256: str, size: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "@type": "cr:FileObject", "@id": path, "name": path, "contentUrl": path, "encodingFormat": kind,
        "sha256": sha256,
    }  # fmt: skip
    return found if size is None else found | {"contentSize": f"{size} B"}


def _column(field: pa.Field) -> dict[str, Any]:
    kind = field.type
    found: dict[str, Any] = {"@type": "cr:Field", "@id": f"samples/{field.name}", "name": field.name}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        found["repeated"] = True
        kind = kind.value_type
    source = {"fileObject": {"@id": "manifest.parquet"}, "extract": {"column": field.name}}
    return found | {"dataType": _type(kind), "source": source}


def _type(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    if pa.types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"

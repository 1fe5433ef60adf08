"""What a release says of a sample: the columns of the manifest and of `<key>.json`.

All columns of the run's tables but embeddings, the status (always ok) and where the source's bytes lie.
"""

import base64
import datetime
import decimal
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from curate.config import EmitSettings
from curate.errors import PlanError
from curate.rows import MEMBER, SAMPLES, Column, columns_of
from curate.schema import KEY, LOCATION_FIELDS, TableSpec

EMBEDDINGS = "embeddings_"
SCORES = "scores_"
FACES = "face_boxes"
PLACE = (
    pa.field("tar", pa.string(), nullable=False),  # below the subset's folder
    pa.field("offset", pa.int64(), nullable=False),  # of the image member's data, bytes
    pa.field("length", pa.int64(), nullable=False),
    pa.field("member_sha256", pa.string(), nullable=False),  # of the image member as emitted
)
SUBSET = pa.field("subset", pa.string(), nullable=False)
_SOURCE = ("tar", "offset", "length", "ext")  # of the stored image, for reading it
_HIDDEN = ("status", "error", "tar", "offset", "length")
_RESERVED = (SUBSET.name, *(field.name for field in PLACE), "image")


@dataclass(frozen=True)
class Facts:
    """The wide columns that emission reads, and which of them go where."""

    columns: Mapping[str, Column]
    manifest: tuple[str, ...]  # wide names, `key` first
    json: tuple[str, ...]
    features: tuple[str, ...]  # embedding columns

    def check_faces(self) -> None:
        """Raise PlanError when nothing says where faces are."""
        if FACES not in self.columns:
            raise PlanError(f"emit.blur_faces: no table has {FACES}; add `faces: {{scorer: faces}}` to `score:`")

    @property
    def scores(self) -> list[str]:
        """Numbers that scorers gave, by their names in the manifest."""
        kinds = {name: self.columns[name] for name in self.manifest}
        return [
            self.label(name)
            for name, column in kinds.items()
            if column.table.name.startswith(SCORES) and _is_number(column.type)
        ]

    @property
    def read(self) -> tuple[str, ...]:
        """Everything that is read from the tables."""
        return tuple(dict.fromkeys([*self.manifest, *_SOURCE, *self.features]))

    @property
    def tables(self) -> list[TableSpec]:
        """The tables behind these columns."""
        return list({self.columns[name].table.name: self.columns[name].table for name in self.read}.values())

    def manifest_schema(self) -> pa.Schema:
        """subset, key, url, text, every other fact, tar, offset, length, member_sha256."""
        facts = [pa.field(self.label(name), self.columns[name].type) for name in self.manifest if name != KEY.name]
        return pa.schema([SUBSET, KEY, *facts, *PLACE])

    def label(self, name: str) -> str:
        """Name in the manifest of a wide column."""
        return f"source_{name}" if name in _RESERVED else name


def facts_of(tables: Sequence[TableSpec], columns: Sequence[str] | None, features: Sequence[str]) -> Facts:
    """The facts of a run's tables; `columns` narrows the JSON. Raises PlanError for a name that no table has."""
    wide = columns_of([spec for spec in tables if not spec.name.startswith(MEMBER)])
    held = wide.get("tar")
    if held is None or held.table.name == SAMPLES:
        raise PlanError(
            "emit: no table says where images lie (columns tar, offset, length); fetch or adopt a pool first"
        )
    places = {field.name for field in LOCATION_FIELDS}
    assert places <= set(wide)
    vectors = [name for name, column in wide.items() if column.table.name.startswith(EMBEDDINGS)]
    known = [name for name in wide if name not in (*_HIDDEN, *vectors)]
    first = [name for name in (KEY.name, "url", "text") if name in known]
    manifest = tuple(dict.fromkeys([*first, *known]))
    chosen = manifest if columns is None else tuple(dict.fromkeys(columns))
    _check("emit.columns", chosen, known)
    _check("emit.features", features, [name for name in vectors if name != KEY.name])
    return Facts(wide, manifest, chosen, tuple(dict.fromkeys(features)))


def _check(place: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            told = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known) or 'none'}"
            raise PlanError(f"{place}: no column {name}; {told}")


def json_records(rows: pa.Table | pa.RecordBatch, names: Sequence[str]) -> list[bytes]:
    """`<key>.json` of every row: the named columns in their order, UTF-8, values that any JSON reader takes."""
    columns = []
    for name in names:
        column = rows.column(name)
        values = column.to_pylist()
        columns.append(values if _is_plain(column.type) else [plain(value) for value in values])
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    return [
        encode(dict(zip(names, values, strict=True))).encode("utf-8", "replace")
        for values in zip(*columns, strict=True)
    ]


def plain(value: Any) -> Any:  # noqa: PLR0911  # one line for each kind of value
    """A value as JSON has it: NaN and infinities are null, times ISO 8601, bytes base64, decimals strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    return value


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _is_plain(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def card_features(facts: Facts, settings: EmitSettings) -> list[dict[str, Any]] | None:
    """The members of a sample in the words of a Hugging Face card; None where they cannot be said.

    Without them `datasets` guesses types from five samples, and stops at a column that was null in all of them.
    """
    if facts.features:
        return None
    images = [
        {"name": ext, "dtype": "image"}
        for ext in (("jpg",) if settings.image_names == "jpg" else ("jpg", "png", "webp"))
    ]
    columns = [_card_field(name, facts.columns[name].type) for name in facts.json]
    record = [{"name": "json", "struct": columns}] if columns else []
    strings = [{"name": name, "dtype": "string"} for name in ("__key__", "__url__")]
    texts = [{"name": "txt", "dtype": "string"}] if settings.captions else []
    return [*images, *texts, *record, *strings]


def _card_field(name: str, kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_struct(kind):
        return {"name": name, "struct": [_card_field(part.name, part.type) for part in kind]}
    inner = _card_type(kind)
    return {"name": name, "dtype": inner} if isinstance(inner, str) else {"name": name, **inner}


def _card_type(kind: pa.DataType) -> str | dict[str, Any]:
    """A type as `plain` writes it to JSON and a card names it."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return {"list": _card_type(kind.value_type)}
    if pa.types.is_struct(kind):
        return {"struct": [_card_field(part.name, part.type) for part in kind]}
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return str(kind)
    if pa.types.is_floating(kind):
        return "float64" if kind == pa.float64() else "float32"
    return "string"

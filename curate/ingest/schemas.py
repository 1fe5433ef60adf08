"""Which column is the URL and which the text: the published tables of image URLs, recognised by their columns.

A table that fits no entry, or two different ones, is refused with what was found and what to write. Nothing is guessed
from values, except in tables without a header (`headerless`). Nothing here reads files.

Names in `samples`: url and text under ours; a column of the source that is called like one of ours without being it
(img2dataset's `key`) becomes `source_<name>`; LAION's WIDTH and HEIGHT become `width` and `height`, because DuckDB's
names know no case and the `images` table has these two; every other column keeps its own name.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from curate.errors import SourceError
from curate.schema import IMAGES_SCHEMA, SAMPLE_FIELDS

OURS = tuple(field.name for field in SAMPLE_FIELDS)
_LOWERED = {name for name in IMAGES_SCHEMA.names if name not in OURS}


@dataclass(frozen=True)
class Layout:
    """How columns become ours: `columns` maps ours to theirs; the contents of the two in `swap` are exchanged."""

    name: str
    columns: Mapping[str, str]
    swap: tuple[str, str] | None = None


@dataclass(frozen=True)
class Known:
    """A published table: the columns it must have and must not have, and which are ours."""

    needs: frozenset[str]
    url: str
    text: str
    lacks: frozenset[str] = frozenset()
    swap: tuple[str, str] | None = None


def _known(needs: str, url: str, text: str, lacks: str = "", swap: tuple[str, str] | None = None) -> Known:
    return Known(frozenset(needs.split()) | {url, text}, url, text, frozenset(lacks.split()), swap)


# The most demanding entry that fits wins; entries that agree on (url, text, swap) do not contradict one another.
SCHEMAS: dict[str, Known] = {
    # kakaobrain/coyo-dataset README, "Dataset"
    "coyo-700m": _known("id image_phash clip_similarity_vitb32 clip_similarity_vitl14", "url", "text"),
    # laion.ai blog laion-400-open-dataset; WIDTH and HEIGHT are what they say
    "laion-400m": _known("SAMPLE_ID LICENSE NSFW similarity", "URL", "TEXT"),
    # laion.ai blog laion-5b. In the original tables WIDTH holds the height and HEIGHT the width (laion-prepro swaps
    # them back when it joins); the joined tables, which have hash, punsafe or pwatermark, are right.
    "laion-5b": _known(
        "WIDTH HEIGHT similarity", "URL", "TEXT", lacks="SAMPLE_ID hash punsafe pwatermark", swap=("WIDTH", "HEIGHT")
    ),
    "laion-5b joined": _known("WIDTH HEIGHT similarity hash", "URL", "TEXT", lacks="SAMPLE_ID"),
    # laion.ai blog relaion-5b
    "re-laion-5b": _known("similarity punsafe", "url", "caption"),
    # mlfoundations/datacomp: metadata of the pools
    "datacomp": _known("uid original_width original_height clip_l14_similarity_score", "url", "text"),
    # rom1504/img2dataset: the table beside each tar
    "img2dataset": _known("key status error_message", "url", "caption"),
    "URL and TEXT": _known("", "URL", "TEXT"),
    "url and text": _known("", "url", "text"),
    "url and caption": _known("", "url", "caption"),
    "url and txt": _known("", "url", "txt"),
    "url and alt": _known("", "url", "alt"),
}


def recognise(path: str, found: Sequence[str], columns: Mapping[str, str]) -> Layout:
    """The layout of a table with these columns; `columns` (ours: theirs), when given, decides.

    Raises SourceError for an unknown or ambiguous table, with what was found and what to write.
    """
    if columns:
        return _as_told(path, found, columns)
    names = set(found)
    fitting = {name: known for name, known in SCHEMAS.items() if known.needs <= names and not known.lacks & names}
    if not fitting:
        raise SourceError(
            f"{path}: its columns are those of no schema that is known ({', '.join(SCHEMAS)}); found: "
            f"{', '.join(found)}. Say which is which: ingest.columns: {{url: …, text: …}}"
        )
    most = max(len(known.needs) for known in fitting.values())
    best = {name: known for name, known in fitting.items() if len(known.needs) == most}
    if len({(known.url, known.text, known.swap) for known in best.values()}) > 1:
        readings = "; ".join(f"{name}: url={known.url}, text={known.text}" for name, known in best.items())
        first = next(iter(best.values()))
        raise SourceError(
            f"{path}: ambiguous columns ({readings}); found: {', '.join(found)}. Say which is which, e.g. "
            f"ingest.columns: {{url: {first.url}, text: {first.text}}}"
        )
    name, known = next(iter(best.items()))
    return Layout(name, {"url": known.url, "text": known.text}, known.swap)


def _as_told(path: str, found: Sequence[str], columns: Mapping[str, str]) -> Layout:
    absent = [theirs for theirs in columns.values() if theirs not in found]
    if absent or "url" not in columns or "key" in columns:
        what = f"no column {', '.join(absent)}" if absent else "`url` must be there, `key` is made by curate"
        raise SourceError(
            f"{path}: ingest.columns {dict(columns)} does not fit: {what}; found: {', '.join(found)}. "
            "Write ours: theirs, e.g. {url: URL, text: TEXT}"
        )
    return Layout("ingest.columns", dict(columns))


def headerless(path: str, rows: Sequence[Sequence[str]], columns: Mapping[str, str]) -> Layout:
    """The layout of a table without a header, whose columns are called "0", "1", …

    CC3M is caption, url and CC12M is url, caption: the column whose values are web addresses is the URL.
    Raises SourceError when it is not two columns or no single one of them is.
    """
    width = len(rows[0]) if rows else 0
    if columns:
        return _as_told(path, [str(place) for place in range(width)], columns)
    web = [place for place in range(width) if all(looks_like_url(row[place]) for row in rows if len(row) == width)]
    if width != 2 or len(web) != 1:
        raise SourceError(
            f"{path}: no header, {width} columns, of which {len(web)} hold web addresses; known without a header are "
            'CC3M (caption, url) and CC12M (url, caption). Number them: ingest.columns: {url: "0", text: "1"}'
        )
    url = web[0]
    return Layout("cc3m" if url else "cc12m", {"url": str(url), "text": str(1 - url)})


def looks_like_url(value: str) -> bool:
    """Whether a value, not a column's name, stands there."""
    return value.strip().lower().startswith(("http://", "https://"))


def names_in_samples(own: Iterable[str], layout: Layout) -> dict[str, str]:
    """Own column -> its name in `samples`. Raises SourceError when two would get the same name.

    A column without a name, as pandas writes its index to CSV, is called `unnamed`: SQL has no empty names.
    """
    own = list(own)
    again = sorted({name for name in own if own.count(name) > 1})
    if again:
        raise SourceError(f"two columns have the same name: {', '.join(again)}; rename one in the source")
    given = {theirs: ours for ours, theirs in layout.columns.items()}
    named: dict[str, str] = {}
    for name in own:
        if name in given:
            named[name] = given[name]
        elif name.lower() in OURS or name.lower() in {ours.lower() for ours in layout.columns}:
            named[name] = f"source_{name}"
        else:
            named[name] = (name.lower() if name.lower() in _LOWERED else name) or "unnamed"
    lowered = [name.lower() for name in named.values()]
    twice = sorted({name for name in named.values() if lowered.count(name.lower()) > 1})
    if twice:
        raise SourceError(f"columns {', '.join(twice)} differ only in upper and lower case; SQL cannot tell them apart")
    return named


def unite(fixed: pa.Schema | None, fresh: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """The schema of `samples`: the pool's columns as they are, then those that new sources bring, in their order.

    Two new sources that disagree about a type get the wider one; a type that the pool has already stays.
    Raises SourceError when no type holds both.
    """
    fields: dict[str, pa.Field] = {field.name.lower(): field for field in fixed or SAMPLE_FIELDS}
    settled = set(fields)
    for path, schema in fresh:
        for field in schema:
            folded = field.name.lower()
            held = fields.get(folded)
            if held is None:
                fields[folded] = field
            elif held.type != field.type and pa.types.is_nested(held.type) | pa.types.is_nested(field.type):
                raise SourceError(f"{path}: column {field.name} is {field.type}, in other sources {held.type}")
            elif folded not in settled:
                fields[folded] = held.with_type(_wider(held.type, field.type))
    return pa.schema([field if not pa.types.is_null(field.type) else field.with_type(pa.string())
                      for field in fields.values()])  # fmt: skip


def _wider(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    try:
        united = pa.unify_schemas([pa.schema([("x", one)]), pa.schema([("x", other)])], promote_options="permissive")
        return united.field("x").type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.string()

"""`curate score`: any scorers on a folder of images, one row a file, without a pool, a store or Ray.

The quickest way to try a scorer. A file that cannot be read or decoded is a row with its status and nulls. Files come
in path order; captions are matched by path, by path below the folder, or by name where that is unique.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from curate.errors import PlanError, SourceError
from curate.metrics import progress
from curate.schema import OK
from curate.score.chunk import Chunk
from curate.score.decode import Picture, Unscorable
from curate.score.entries import Section, choose
from curate.score.registry import build
from curate.score.run import Raised, Runner, prepare, score_texts
from curate.score.scorer import Device, FeatureScorer, ImageScorer, Scorer, ScorerSettings, TextScorer, Values
from curate.score.stage import CPU_ROWS, device_of
from curate.score.weight_files import files_below

SUFFIXES = frozenset([".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm"])
FILE_COLUMNS = ("file", "path", "filename", "image")
CAPTION_COLUMNS = ("caption", "text")


@dataclass(frozen=True)
class FolderScores:
    """What was scored: rows by status, counted reasons, and the table unless it was written to a file."""

    rows: int
    statuses: Mapping[str, int]
    reasons: Mapping[str, int]
    schema: pa.Schema
    table: pa.Table | None


class _Status(ImageScorer[str]):
    """Whether an image could be decoded; stands first, so that every file has a status."""

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        return (pa.field("status", pa.string()),)

    def prepare(self, picture: Picture, text: str | None) -> str | Unscorable:
        return OK

    def score(self, prepared: Sequence[str]) -> Mapping[str, Values]:
        return {"status": prepared}


@dataclass
class _Files:
    """Files in order, and the caption of each."""

    paths: list[Path]
    captions: list[str | None] = field(default_factory=list)


def score_folder(
    paths: Sequence[Path | str],
    with_: Sequence[str],
    captions: Path | str | None = None,
    out: Path | str | None = None,
    entries: Section | None = None,
) -> FolderScores:
    """Score folders (searched for images) and files with the scorers, entries or columns named in `with_`.

    `captions`: CSV, TSV or Parquet with the columns file and caption. `out`: `.parquet` or `.csv`; without it the
    table is returned. `entries` are a recipe's own `score:` section. Raises PlanError or WeightsError before a file is
    read, SourceError when there is nothing to score.
    """
    if not with_:
        raise PlanError("--with: name at least one scorer or column, e.g. text_density")
    choice = choose(with_, entries)
    scorers = build(choice.section)
    for scorer in scorers:
        scorer.check()
    if out is not None and (Path(out).suffix not in (".parquet", ".csv") or Path(out).is_dir()):
        raise PlanError(f"--out {out}: write to a file, .parquet or .csv")
    files = _gather([Path(path) for path in paths], None if captions is None else Path(captions))
    fields = {f.name: f for scorer in scorers for f in (*scorer.fields, *scorer.embeddings)}
    own = [name for name in ("path", "status") if name in fields]
    if own:
        raise PlanError(f"--with: a scorer writes the column {own[0]}, which the table has of its own; set `column:`")
    schema = pa.schema(
        [pa.field("path", pa.string()), *(fields[name] for name in choice.columns), pa.field("status", pa.string())]
    )
    statuses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    tables: list[pa.Table] = []
    with progress("score", len(files.paths)) as ticker, _Writer(out, schema) as writer:
        for table in _score(scorers, files, schema, reasons):
            statuses.update(table.column("status").to_pylist())
            ticker.advance(table.num_rows, ", ".join(f"{name} {count:,}" for name, count in statuses.most_common(3)))
            writer.write(table)
            if out is None:
                tables.append(table)
    whole = pa.concat_tables(tables) if out is None else None
    return FolderScores(len(files.paths), dict(statuses), dict(sorted(reasons.items())), schema, whole)


def _score(scorers: Sequence[Scorer], files: _Files, schema: pa.Schema, reasons: Counter[str]) -> Iterator[pa.Table]:
    cores = os.cpu_count() or 1
    for scorer in scorers:
        device = device_of(scorer)
        scorer.load(Device(device.name, cores))  # alone on this machine: all cores
    images: list[ImageScorer[Any]] = [_Status("status", ScorerSettings())]
    images += [scorer for scorer in scorers if isinstance(scorer, ImageScorer)]
    counts: Counter[str] = Counter()
    runner = Runner(images, [scorer for scorer in scorers if isinstance(scorer, FeatureScorer)], counts)
    texts = [scorer for scorer in scorers if isinstance(scorer, TextScorer)]
    spans = [range(start, min(start + CPU_ROWS, len(files.paths))) for start in range(0, len(files.paths), CPU_ROWS)]
    with ThreadPoolExecutor(cores, "curate-decode") as pool:
        following = _submit(pool, images, files, spans[0])
        for number, span in enumerate(spans):
            jobs = following
            following = [] if span is spans[-1] else _submit(pool, images, files, spans[number + 1])
            prepared = [job.result() for job in jobs]
            captions = [files.captions[row] for row in span]
            columns = runner.run(Chunk(len(span), list(range(len(span))), texts=captions), prepared)
            for text_scorer in texts:
                columns |= score_texts(text_scorer, captions, counts)
            seen = [values[0] for values in prepared]
            status = [value.reason if isinstance(value, Unscorable | Raised) else OK for value in seen]
            columns["status"] = pa.array(status, pa.string())
            columns["path"] = pa.array([_shown(files.paths[row]) for row in span], pa.string())
            yield pa.table([columns[name] for name in schema.names], schema=schema)
    reasons.update({reason: count for reason, count in counts.items() if not reason.startswith("scores_status")})


def _submit(
    pool: ThreadPoolExecutor, scorers: Sequence[ImageScorer[Any]], files: _Files, span: range
) -> list[Future[list[Any]]]:
    return [pool.submit(_load, scorers, files.paths[row], files.captions[row]) for row in span]


def _load(scorers: Sequence[ImageScorer[Any]], path: Path, text: str | None) -> list[Any]:
    try:
        data = path.read_bytes()
    except OSError:
        return [Unscorable("unreadable")] * len(scorers)
    return prepare(scorers, data, text)


def _gather(paths: Sequence[Path], captions: Path | None) -> _Files:
    """The files below the folders and those named, each once, and their captions."""
    found: dict[Path, str] = {}  # path: as a caption table may name it
    for path in paths:
        if path.is_dir():
            inside = [file for file in files_below(path) if file.suffix.lower() in SUFFIXES]
            found |= {file: file.relative_to(path).as_posix() for file in inside if file not in found}
        elif path.is_file():
            found.setdefault(path, path.name)
        else:
            what = "neither a plain file nor a folder" if path.exists() else "no such file or folder"
            raise SourceError(f"{path}: {what}")
    if not found:
        raise SourceError(f"{', '.join(map(str, paths))}: no images ({', '.join(sorted(SUFFIXES))})")
    if captions is None:
        return _Files(list(found), [None] * len(found))
    table = _captions(captions)
    names = Counter(Path(name).name for name in table)
    by_name = {Path(name).name: text for name, text in table.items() if names[Path(name).name] == 1}
    ends = [(str(path), below, by_name.get(path.name)) for path, below in found.items()]
    texts = [table.get(whole, table.get(below, loose)) for whole, below, loose in ends]
    if not any(text is not None for text in texts):
        raise SourceError(f"{captions}: none of its {len(table):,} files is among the {len(found):,} to score")
    return _Files(list(found), texts)


def _captions(file: Path) -> dict[str, str | None]:
    """File name to caption. Raises SourceError."""
    try:
        if file.suffix == ".parquet":
            table = pq.read_table(file)
        else:
            tabs = file.suffix == ".tsv"
            quoting = pc.ParseOptions(delimiter="\t" if tabs else ",", newlines_in_values=True)
            plain = {
                name: pa.string() for name in (*FILE_COLUMNS, *CAPTION_COLUMNS)
            }  # else 007 is read as 7, NA as null
            table = pc.read_csv(file, parse_options=quoting, convert_options=pc.ConvertOptions(column_types=plain))
    except (OSError, pa.ArrowInvalid) as error:
        raise SourceError(f"{file}: not a table of captions: {error}") from None
    names = next((name for name in FILE_COLUMNS if name in table.column_names), None)
    texts = next((name for name in CAPTION_COLUMNS if name in table.column_names), None)
    if names is None or texts is None:
        raise SourceError(f"{file}: expected the columns file and caption, found {', '.join(table.column_names)}")
    try:
        found = zip(*(table.column(name).cast(pa.string()) for name in (names, texts)), strict=True)
    except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:  # twice there, not UTF-8, a list
        raise SourceError(f"{file}: {names} and {texts} must be one column of text each: {error}") from None
    return {str(name): text.as_py() for name, text in found if name.is_valid}


def _shown(path: Path) -> str:
    """A path as text: bytes of a name that are not UTF-8, which no table holds, as `\\udcff`."""
    return str(path).encode("utf-8", "backslashreplace").decode()


class _Writer:
    """A Parquet or CSV file that grows batch by batch under a hidden name, and gets its own when all is written.

    Nothing when there is no file to write. An earlier file stays as it was when this one is not finished.
    """

    def __init__(self, out: Path | str | None, schema: pa.Schema) -> None:
        self._out, self._schema = None if out is None else Path(out), schema
        self._growing = None if self._out is None else self._out.with_name(f".{self._out.name}.{os.getpid()}")
        self._writer: Any = None

    def __enter__(self) -> "_Writer":
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            known = pq.ParquetWriter if self._out.suffix == ".parquet" else pc.CSVWriter
            self._writer = known(self._growing, _flat(self._schema) if known is pc.CSVWriter else self._schema)
        return self

    def write(self, table: pa.Table) -> None:
        """Append."""
        if self._writer is not None:
            self._writer.write_table(table if isinstance(self._writer, pq.ParquetWriter) else _as_text(table))

    def __exit__(self, failure: type[BaseException] | None, *rest: object) -> None:
        if self._writer is None or self._growing is None or self._out is None:
            return
        self._writer.close()
        if failure is None:
            self._growing.replace(self._out)
        else:
            self._growing.unlink(missing_ok=True)


def _flat(schema: pa.Schema) -> pa.Schema:
    """CSV has no lists: they become JSON."""
    return pa.schema([pa.field(f.name, pa.string()) if pa.types.is_nested(f.type) else f for f in schema])


def _as_text(table: pa.Table) -> pa.Table:
    flat = _flat(table.schema)
    columns = [
        pa.array(
            [None if value is None else json.dumps(value) for value in table.column(f.name).to_pylist()], pa.string()
        )
        if pa.types.is_nested(f.type)
        else table.column(f.name)
        for f in table.schema
    ]
    return pa.table(columns, schema=flat)

"""A release in the forms that other tools read: tables, lists of ids, byte-range indices. Pixels are never copied,
but for MetaCLIP's layout.

Each export reads `manifest.parquet` a tar at a time and writes below a folder of this machine. Columns that a form has
and the release lacks are null; nothing is made up. Sources of the forms: RECIPES 9 (COYO), 10 (LAION), 11 (DataComp),
2 (DINOv2).
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.emit.croissant import export_croissant
from curate.emit.hub import export_datasets
from curate.emit.metaclip import export_metaclip
from curate.emit.verify import refuse_withdrawn
from curate.errors import PlanError, ReleaseError
from curate.store import Store
from curate.tar import BLOCK

# COYO-700M's 17 columns.
COYO = pa.schema([
    ("id", pa.int64()), ("url", pa.string()), ("text", pa.string()), ("width", pa.int32()), ("height", pa.int32()),
    ("image_phash", pa.string()), ("text_length", pa.int32()), ("word_count", pa.int32()),
    ("num_tokens_bert", pa.int32()), ("num_tokens_gpt", pa.int32()), ("num_faces", pa.int32()),
    ("clip_similarity_vitb32", pa.float32()), ("clip_similarity_vitl14", pa.float32()),
    ("nsfw_score_opennsfw2", pa.float32()), ("nsfw_score_gantman", pa.float32()), ("watermark_score", pa.float32()),
    ("aesthetic_score_laion_v2", pa.float32()),
])  # fmt: skip
# LAION-400M's columns; LICENSE is "?" where unknown, as there.
LAION = pa.schema([
    ("SAMPLE_ID", pa.int64()), ("URL", pa.string()), ("TEXT", pa.string()), ("LICENSE", pa.string()),
    ("NSFW", pa.string()), ("similarity", pa.float64()), ("WIDTH", pa.int32()), ("HEIGHT", pa.int32()),
])  # fmt: skip
_COYO_FROM = {"width": ("original_width", "width"), "height": ("original_height", "height")}
_LAION_FROM = {
    "URL": ("url",), "TEXT": ("text",), "LICENSE": ("LICENSE", "license"), "NSFW": ("NSFW",),
    "similarity": ("clip_similarity_vitb32", "similarity"), "WIDTH": ("original_width", "width"),
    "HEIGHT": ("original_height", "height"),
}  # fmt: skip
# What may be handed on without the images and captions: these, and every number.
_PUBLIC = ("url", "sha256", "image_phash")
_PLACE = ("offset", "length")


def export_coyo(release: str, subset: str, out: Path) -> Path:
    """`<out>/part-00000.parquet` with COYO's 17 columns. Width and height are the original image's, as in COYO."""
    return _table(release, subset, out, COYO, _COYO_FROM, "id")


def export_laion(release: str, subset: str, out: Path) -> Path:
    """`<out>/part-00000.parquet` with LAION-400M's columns; similarity is that of ViT-B/32."""
    return _table(release, subset, out, LAION, _LAION_FROM, "SAMPLE_ID")


def export_datacomp(release: str, subset: str, out: Path) -> Path:
    """`<out>/<subset>.npy`: sorted 128-bit ids as `u8,u8`, what DataComp's resharder takes as `-s`.

    The source's `uid` where there is one (DataComp), else the key, which has 128 bits as well.
    """
    parts = [np.zeros(0, dtype="u8,u8")]
    for rows in _tars(release, subset):
        ids = rows.column("uid" if "uid" in rows.column_names else "key").to_pylist()
        if any(uid is None or len(uid) != 32 for uid in ids):
            raise ReleaseError(f"{release}/{subset}: a uid is not 32 hex digits")
        parts.append(np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in ids], dtype="u8,u8"))
    path = _place(out, f"{subset}.npy")
    np.save(path, np.sort(np.concatenate(parts)))
    return path


def export_urls(release: str, subset: str, out: Path) -> Path:
    """`<out>/<subset>.parquet`: uid, url, sha256 of the bytes as served, pHash, and all numbers; no image, no caption.

    No other text goes along, neither of the source nor what a scorer read in a picture. img2dataset downloads it with
    `--url_col url --verify_hash '["sha256","sha256"]'`.
    """
    path = _place(out, f"{subset}.parquet")
    with _Writer(path) as writer:
        for rows in _tars(release, subset):
            uid = rows.column("uid" if "uid" in rows.column_names else "key")
            kept = [field.name for field in rows.schema if field.name in _PUBLIC or _is_numeric(field.type)]
            kept = [name for name in kept if name not in _PLACE]
            writer.write(rows.select(kept).add_column(0, "uid", uid))
    return path


def _is_numeric(kind: pa.DataType) -> bool:
    """Numbers, truths, and lists of them."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _is_numeric(kind.value_type)
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def export_entries(release: str, subset: str, out: Path) -> Path:
    """`<out>/entries.npy` and `<out>/class-ids.npy`, with which DINOv2's ImageNet22k class reads our tars as they are.

    Use `dataset_path=ImageNet22k:root=<release>/<subset>:extra=<out>`. Its "class" is the tar; it takes byte ranges
    that start at the member's 512-byte header (dinov2/data/datasets/image_net_22k.py, get_image_data). Labels mean
    nothing: pre-training does not read them. Returns the path of entries.npy.
    """
    parts: list[np.ndarray] = []
    tars: list[str] = []
    # 64-bit offsets where DINOv2's own files have 32: a tar may be larger than 4 GiB, and numpy's fields go by name.
    kind = [
        ("class_index", "<u4"),
        ("class_id", "U8"),
        ("start_offset", "<u8"),
        ("end_offset", "<u8"),
        ("filename", "U40"),
    ]
    for rows in _tars(release, subset):
        entries = np.empty(rows.num_rows, dtype=kind)
        name = rows.column("tar")[0].as_py().removesuffix(".tar")
        offset = rows.column("offset").to_numpy()
        entries["class_index"], entries["class_id"] = len(tars), name
        entries["start_offset"], entries["end_offset"] = offset - BLOCK, offset + rows.column("length").to_numpy()
        entries["filename"] = [f"{key}.jpg" for key in rows.column("key").to_pylist()]
        parts.append(entries)
        tars.append(name)
    np.save(_place(out, "class-ids.npy"), np.array(tars, dtype="U8"))
    path = _place(out, "entries.npy")
    np.save(path, np.concatenate(parts) if parts else np.empty(0, dtype=kind))
    return path


EXPORTS: Mapping[str, Callable[[str, str, Path], Path]] = {
    "coyo": export_coyo,
    "laion": export_laion,
    "datacomp": export_datacomp,
    "urls": export_urls,
    "entries": export_entries,
    "croissant": export_croissant,
    "datasets": export_datasets,
    "metaclip": export_metaclip,
}


def only_subset(release: str, subset: str | None) -> str:
    """The subset that is meant: the one named, or the only one. Raises PlanError."""
    names: list[str] = list((Store(release).get_json("release.json") or {"subsets": {}})["subsets"])
    if subset is not None:
        return subset
    if len(names) != 1:
        raise PlanError(f"{release}: name one with --subset: {', '.join(names) or 'no release.json is there'}")
    return names[0]


def _tars(release: str, subset: str) -> Iterator[pa.Table]:
    """The manifest's rows of a subset, a tar at a time. Raises PlanError for an unknown subset."""
    store = Store(release)
    note = store.get_json("release.json")
    if note is None or subset not in note["subsets"]:
        known = ", ".join(note["subsets"]) if note else "no release.json is there"
        raise PlanError(f"{release}: no subset {subset} ({known})")
    refuse_withdrawn(store, "")
    with store.open("manifest.parquet") as handle, pq.ParquetFile(handle) as file:
        for number in range(file.metadata.num_row_groups):
            rows = file.read_row_group(number)
            if rows.num_rows and rows.column("subset")[0].as_py() == subset:
                yield rows


def _table(
    release: str, subset: str, out: Path, schema: pa.Schema, sources: Mapping[str, tuple[str, ...]], number: str
) -> Path:
    path = _place(out, "part-00000.parquet")
    with _Writer(path, schema) as writer:
        for rows in _tars(release, subset):
            columns = [_column(rows, field, sources.get(field.name, (field.name,))) for field in schema]
            table = pa.table(columns, schema=schema)
            if table.column(number).null_count:
                ids = pc.coalesce(table.column(number), _numbers(rows))
                table = table.set_column(schema.get_field_index(number), schema.field(number), ids)
            if "LICENSE" in schema.names:
                place = schema.get_field_index("LICENSE")
                table = table.set_column(place, schema.field(place), pc.fill_null(table.column(place), "?"))
            writer.write(table)
    return path


def _column(rows: pa.Table, field: pa.Field, names: tuple[str, ...]) -> pa.ChunkedArray | pa.Array:
    """The first of these columns that the manifest has, values that are null there from the next."""
    held = [pc.cast(rows.column(name), field.type) for name in names if name in rows.column_names]
    return pc.coalesce(*held) if held else pa.nulls(rows.num_rows, field.type)


def _numbers(rows: pa.Table) -> pa.Array:
    """A positive 63-bit number of each key."""
    return pa.array([int(key[:16], 16) >> 1 for key in rows.column("key").to_pylist()], pa.int64())


def _place(out: Path, name: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    return out / name


class _Writer:
    """A Parquet file whose schema may come with its first table; an empty one without columns if none comes.

    It takes its place when it is whole: an export that fails leaves what was there.
    """

    def __init__(self, path: Path, schema: pa.Schema | None = None) -> None:
        self._path, self._partial, self._schema = path, path.with_name(f"{path.name}.part"), schema
        self._file: pq.ParquetWriter | None = None

    def __enter__(self) -> "_Writer":
        return self

    def write(self, table: pa.Table) -> None:
        if self._file is None:
            self._file = pq.ParquetWriter(self._partial, table.schema, compression="zstd")
        self._file.write_table(table)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._file is None:
            self._file = pq.ParquetWriter(self._partial, self._schema or pa.schema([]))
        self._file.close()
        if error is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink()

"""The recipe file: YAML in, frozen and validated settings out.

Unknown keys are refused, and every error names the key, what was found and what was expected. Settings that only one
scorer understands are checked by that scorer in the plan (`curate/score/registry.py`). Nothing here reads data.
"""

import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from curate.errors import ConfigError
from curate.overrides import apply

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
SubsetName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]
Place = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]  # a path or URL; "" would mean the current folder


class Settings(BaseModel):
    """Base of all sections: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class IngestSettings(Settings):
    """Which rows exist. `sources` are tables of URLs. `adopt` are WebDataset folders: alone, indexed in place; beside
    `sources`, copied as they are."""

    sources: list[Place] = []
    adopt: list[Place] = []
    columns: dict[str, str] = {}  # ours: theirs, e.g. {url: URL, text: TEXT}; empty: recognised by their names
    where: str | None = None  # SQL over the source's own columns, before anything is fetched
    rows_per_shard: Positive = 10_000
    features: dict[str, str] = {}  # table: array of the .npz beside each table, e.g. {embeddings_clip_vitl14: l14_img}

    @model_validator(mode="after")
    def _one_kind(self) -> "IngestSettings":
        if not self.sources and not self.adopt:
            raise ValueError("write `sources` (tables of URLs), `adopt` (existing WebDataset pools), or both")
        return self


class VerifyHash(Settings):
    """Refuse bytes that are not those the table was made from (an expired domain may serve anything)."""

    column: str  # of the source table: hex MD5, SHA-1, SHA-256 or SHA-512, told by its length


class FetchSettings(Settings):
    """How images are downloaded; resize names and meanings are img2dataset's."""

    engine: Literal["curate", "img2dataset"] = "curate"
    where: str | None = None  # SQL over the source's and text scorers' columns: only these rows are asked for
    image_size: Positive = 512  # pixels
    resize_mode: Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"] = "keep_ratio_largest"
    resize_only_if_bigger: bool = True
    skip_reencode: bool = True  # keep the served bytes (less their metadata) where no pixel has to change
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: Annotated[int, Field(ge=1, le=100)] = 95
    min_image_size: Annotated[int, Field(ge=0)] = 0  # pixels, the shorter side
    max_aspect_ratio: Annotated[float, Field(gt=0)] | None = None
    max_bytes: Positive = 50_000_000  # of one body
    max_pixels: Positive = 50_000_000  # by the header
    # Of one decoder for one picture, estimated; beyond: too_many_pixels. A pixel takes 16 bytes in a WebP, 8 to 12 in
    # the other formats, under 1 in most JPEGs and 3 to 7 in progressive ones. 300: a worker stays below 600
    decode_memory_mb: Positive = 300
    contact: str | None = None  # mail address or page in the User-Agent; required beyond loopback
    timeout_s: Annotated[float, Field(gt=0)] = 10.0  # of the whole transfer
    retries: Annotated[int, Field(ge=0)] = 2
    concurrency: Positive = 256  # requests at once per worker
    per_host: Positive = 16  # requests at once per host and worker
    allow_networks: list[str] = []  # e.g. [127.0.0.0/8] for a server of your own
    # http://host:port; then it looks names up and must keep inside addresses shut. Its user:password stands in
    # CURATE_PROXY_CREDENTIALS, since recipes are copied into releases
    proxy: Annotated[str, Field(pattern=r"^https?://[^/@?#]+/?$")] | None = None
    strip_metadata: bool = True
    connect_timeout_s: Annotated[float, Field(gt=0)] = 5.0  # also of a DNS lookup
    first_byte_timeout_s: Annotated[float, Field(gt=0)] = 10.0  # until the headers are there
    min_rate_bytes_s: Annotated[float, Field(ge=0)] = 500.0  # after three seconds of body
    dns_servers: list[str] = []  # e.g. [127.0.0.1] for a resolver of your own; empty: the machine's
    dns_concurrency: Positive = 32  # lookups at once per worker
    robots: bool = True  # honour robots.txt: one request more for each host
    opt_out: bool = True  # honour X-Robots-Tag (noai, noimageai, noindex, noimageindex, noml) and tdm-reservation
    verify_hash: VerifyHash | None = None
    block_domains: list[str] = []  # files or URLs of lists, one entry a line; a hit is never stored
    block_urls: list[str] = []
    block_url_hashes: list[str] = []  # MD5, SHA-1 or SHA-256 of the URL
    block_hashes: list[str] = []  # MD5, SHA-1 or SHA-256 of the bytes
    block_phashes: list[str] = []  # 16 hex digits
    block_phash_radius: Annotated[int, Field(ge=0, le=16)] = 4  # bits
    decoders: Positive = 2  # decoding processes per worker

    @field_validator("allow_networks")
    @classmethod
    def _networks(cls, value: list[str]) -> list[str]:
        for network in value:
            ipaddress.ip_network(network)
        return value


class ReferenceSettings(Settings):
    """Images that the pool must not hold, such as evaluation sets: a file of hashes or of embeddings, or the images."""

    name: SubsetName
    hashes: Place | None = None  # .txt (16 hex digits, then an id if there is one) or .parquet
    embeddings: Place | None = None  # .npy [N, d], .npz with ids, or .parquet
    images: Place | None = None  # a folder, …*.tar, or datasets:NAME@COMMIT[:SPLIT]: measured by the rule's own scorer
    radius: Annotated[int, Field(ge=0, le=10)] = 0  # bits, for hashes
    threshold: Annotated[float, Field(gt=-1, le=1)] | None = None  # cosine, exclusive, for embeddings
    match: Literal["component", "direct"] = "component"  # mark all that are connected with a hit, or the hits alone


class DedupSettings(Settings):
    """One way of finding copies. `keep` is an SQL ordering: the first of a group stays."""

    by: str  # sha256, url, image_phash, image_phash_text, embedding_<name>
    keep: str = "width * height DESC, key"
    radius: Annotated[int, Field(ge=0, le=10)] = 0  # Hamming distance, for image_phash
    threshold: Annotated[float, Field(gt=-1, le=1)] | None = None  # cosine, for embedding_<name>
    form: Literal["threshold", "dinov2", "semdedup"] = "threshold"  # of embedding_<name>
    neighbours: Positive = 64  # of the form dinov2: edges from a row to its nearest, above 0.6 unless `threshold` says
    eps: Annotated[float, Field(ge=0, le=1)] | None = None  # of the form semdedup: redundant above cosine 1 - eps
    # pool: those of the section `cells`, trained before, for any form; a number: of the form semdedup, where None means
    # one for each 8,800 rows, as on LAION-440M
    cells: Positive | Literal["pool"] | None = None
    within: bool = True  # False: compare with `against` only
    against: list[ReferenceSettings] = []  # in this order, after the pool's own copies
    prefer_released: bool = True  # rows of the last release come first, whatever `keep` says


class LevelSettings(Settings):
    """A level of hierarchical k-means."""

    count: Positive  # of clusters
    resampling: Annotated[int, Field(ge=0)] = 0  # times that k-means is run again on the closest points
    sample_size: Positive = 1  # closest points of each cluster that it then sees


class CellsSettings(LevelSettings):
    """k-means cells of the pool's vectors: what retrieval searches and balanced sampling counts."""

    by: str  # a column of embeddings, e.g. clip_vitl14_image
    where: str | None = None  # SQL: only these rows are counted, searched and sampled, e.g. NOT is_duplicate
    metric: Literal["cosine", "l2", "ip"] = "cosine"  # ip: trained as l2, assigned by inner product, as DataComp does
    init: Literal["kmeans++", "random"] = "kmeans++"
    iterations: Annotated[int, Field(ge=0)] = 20
    points_per_cell: Positive = 256  # of the sample that k-means is trained on, where memory_gb holds as many
    memory_gb: Annotated[float, Field(gt=0)] = 32.0  # of the one task that trains
    batch: Positive | None = None  # mini-batch k-means: centroids move after so many points; null: Lloyd's
    seed: Seed = 0
    centroids: Place | None = None  # .npy, or _cells/*/centroids.npz of a run: no training, whatever the pool grows to


class SeedSet(Settings):
    """What to look for, and how. Vectors of a file, images, or rows of the pool by SQL."""

    name: SubsetName
    how: Literal["sample", "cluster", "as_is"]
    embeddings: Place | None = None  # .npy, .npz or Parquet
    array: str | None = None  # its array or column, where it has more than one
    images: Place | None = None  # a folder, …*.tar, or datasets:NAME@COMMIT[:SPLIT]: embedded by cells.by's scorer
    where: str | None = None  # SQL over the pool's columns
    k: Positive = 4  # sample: nearest pool images of each seed
    nprobe: Positive = 16  # sample: cells that are searched for each seed
    more_than: Annotated[int, Field(ge=0)] = 3  # cluster: a cell is taken when it holds more seeds
    per_cell: Positive | None = 10_000  # cluster: images from each such cell; null: all
    cap: Positive | None = 1_000_000  # cluster: images of the set

    @model_validator(mode="after")
    def _one_kind(self) -> "SeedSet":
        if sum(map(bool, (self.embeddings, self.images, self.where))) != 1:
            raise ValueError("write one of `embeddings` (a file of vectors), `images`, `where` (rows of the pool)")
        if self.how == "as_is" and not self.where:
            raise ValueError(
                "as_is takes rows of the pool: `curate pack` the set, name its folder in ingest.adopt, and the set by "
                "`where: dataset = …`"
            )
        return self


class RetrieveSettings(Settings):
    """Pool images near seed sets, as DINOv2's table 15 lists them."""

    sets: Annotated[list[SeedSet], Field(min_length=1)]
    codes: Annotated[str, Field(pattern="^(SQ[468]|PQ[1-9][0-9]*)$")] | None = None  # search FAISS codes of the pool;
    rerank: Positive = 8  # of each seed's neighbours by code, so many times k are then compared exactly
    count_once: bool = False  # LVD-142M counts an image as often as seeds found it
    recall_seeds: Positive = 100  # of each sample set, compared with an exact search in every run
    seed: Seed = 0

    @field_validator("sets")
    @classmethod
    def _distinct(cls, value: list[SeedSet]) -> list[SeedSet]:
        if len({one.name for one in value}) < len(value):
            raise ValueError("two seed sets have the same name")
        return value


class HierarchySettings(Settings):
    """Balanced sampling over a tree whose lowest level is the cells, or what each of them is split into."""

    splits: Positive = 1  # clusters of each cell: 100 of each of 100,000 in Vo et al. 2024
    levels: list[LevelSettings] = []  # above
    targets: Annotated[list[Positive], Field(min_length=1)]  # images; a column hierarchical_sample_<target> each
    how: Literal["random", "closest"] = "random"
    multiplier: Positive = 1  # times that an image may be taken
    iterations: Annotated[int, Field(ge=0)] = 50
    points_per_cell: Positive = 256  # where memory_gb holds as many
    memory_gb: Annotated[float, Field(gt=0)] = 32.0  # of the one task that trains a level
    seed: Seed = 0

    @field_validator("targets")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("two targets are equal")
        return value


class BalanceSettings(Settings):
    """MetaCLIP: entries that a caption contains, and a limit to how many captions an entry keeps."""

    entries: Place  # a text file, an entry a line, or a JSON list
    where: str | None = None  # SQL: only these rows are counted and drawn
    column: str = "text"
    version: Literal[1, 2] = 1  # of the matching rules
    t: Annotated[float, Field(gt=0)] | None = None  # matches that an entry keeps
    p: Annotated[float, Field(ge=0, le=1)] | None = None  # instead: share of matches that the tail is to have
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_limit(self) -> "BalanceSettings":
        if (self.t is None) == (self.p is None):
            raise ValueError("write either `t` (matches an entry keeps) or `p` (share of the tail)")
        return self


class ExpertsSettings(Settings):
    """MoDE: captions clustered twice; each coarse cell is an expert."""

    by: str  # a column of text embeddings, e.g. clip_vitl14_text
    where: str | None = None  # SQL; what each refresh may answer otherwise (is_duplicate) belongs into the subsets
    fine: Positive = 1024
    coarse: Positive = 4
    sample: Positive = 1_000_000  # captions that the clusters are trained on
    fine_iterations: Positive = 50
    coarse_iterations: Positive = 100
    seed: Seed = 0


class KeepTop(Settings):
    """Keep the best share: rows whose `by` reaches the resolved threshold."""

    by: str
    fraction: Fraction
    of: str | None = None  # SQL: a share of these rows; None: of those that the subset's `where` leaves


class SubsetSettings(Settings):
    """Rows that satisfy `where` and, of those, the best `keep_top.fraction`."""

    where: str | None = None
    keep_top: KeepTop | None = None


class EmitSettings(Settings):
    """How a release is written."""

    samples_per_shard: Positive = 10_000  # at most; the tars of a subset are of nearly equal size
    bytes_per_shard: Positive | None = None  # of image data; None: cut by samples alone
    min_tars: Positive = 1  # trainers need at least one per loader worker and GPU
    seed: int = 0
    columns: list[str] | None = None  # in <key>.json; None: all that are known of the sample
    captions: bool = True  # <key>.txt, where there is a caption; the manifest has it either way
    features: list[str] = []  # embedding columns to add as <key>.<column>.npy, float16
    # jpg: <key>.jpg whatever the format, as img2dataset, since `datasets` wants equal members. own: jpg, png, webp
    image_names: Literal["jpg", "own"] = "jpg"
    group_samples: Positive = 200_000  # shuffled as one, above that on two levels; 2 kB of memory each in one task
    blur_faces: bool = False  # needs face_boxes; only images with faces are encoded anew
    strip_metadata: bool = False  # EXIF and its like, where an adopted pool still has them
    mask_contacts: bool = False  # e-mail addresses and phone numbers in captions


class EngineSettings(Settings):
    """Where stages run. `workers` caps the processes of a stage by its name."""

    driver: Literal["ray", "inline"] = "ray"
    address: str | None = None  # of a Ray cluster; None: RAY_ADDRESS, else one on this machine
    workers: dict[str, Positive] = {}
    cpus: Positive | None = None  # of a cluster that we start ourselves; None: all cores


class About(Settings):
    """What `curate recipes` says of a recipe. A run reads nothing of it; a release carries it."""

    title: str
    paper: str
    needs: list[str] = []  # models, seed sets, lists, that do not come with curate
    unverified: list[str] = []  # what the authors never published, or what stands in for it here
    published: str = ""  # what the authors say that it took, or gave


class Recipe(Settings):
    """A whole recipe file."""

    about: About | None = None
    pipeline: str = "image_text"
    root: Place
    ingest: IngestSettings
    fetch: FetchSettings = FetchSettings()
    score: dict[SubsetName, dict[str, Any]] = {}
    dedup: list[DedupSettings] = []
    cells: CellsSettings | None = None
    retrieve: RetrieveSettings | None = None
    hierarchy: HierarchySettings | None = None
    balance: BalanceSettings | None = None
    experts: ExpertsSettings | None = None
    subsets: dict[SubsetName, SubsetSettings] = {}
    emit: EmitSettings = EmitSettings()
    engine: EngineSettings = EngineSettings()

    @field_validator("fetch", "score", "dedup", "subsets", "emit", "engine", mode="before")
    @classmethod
    def _empty_section(cls, value: Any, info: Any) -> Any:
        """`section:` with nothing behind it means its defaults."""
        return cls.model_fields[info.field_name].get_default() if value is None else value

    @field_validator("score", "subsets")
    @classmethod
    def _distinct(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Tables are named by these, and neither SQL nor every disk tells upper from lower case."""
        seen: dict[str, str] = {}
        for name in value:
            if seen.setdefault(name.lower(), name) != name:
                raise ValueError(f"{seen[name.lower()]} and {name} differ only in upper and lower case")
        return value


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice, where plain YAML would silently forget the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} is written twice", key.start_mark)
            seen.add(key.value)
        return node


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `a.b=c` overrides (values are YAML).

    Raises ConfigError with the file, the key, what was found and what was expected.
    """
    file = Path(path)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # noqa: S506  # a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe file; `ls configs` shows those that come with curate") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not a readable YAML file: nested too deep") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping with `root:` and `ingest:`, found {type(tree).__name__}")
    for override in overrides:
        apply(tree, override)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe that is already a mapping. Raises ConfigError."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_complaint(item)}" for item in error.errors())) from None


def _complaint(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key; see the README's example for the keys of this section"
    if item["type"] == "missing":
        return f"{key}: required, and not there"
    return f"{key}: {item['msg']}; found {item['input']!r}"[:500]

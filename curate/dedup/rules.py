"""The recipe's dedup entries as rules, checked: what each compares, how, and what it says of a copy.

An entry becomes one rule for the pool's own copies (unless `within: false`) and one for each reference set, in that
order; each is applied to the rows that the rules before it left. It reads no table: what is wrong is found in the plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa

from curate.config import DedupSettings, ReferenceSettings
from curate.dedup.references import read_reference, sum_of
from curate.errors import PlanError
from curate.rows import Column, names_in, schema_of
from curate.schema import KEY

# What a rule compares: the columns whose values must all be equal, or nearly.
EXACT = {
    "sha256": ("sha256",),
    "url": ("url",),  # LAION-5B's bloom filter on the URL
    "image_phash": ("image_phash",),
    "image_phash_text": ("image_phash", "text"),
}
EMBEDDING = "embedding_"
DINOV2_THRESHOLD = 0.6  # RECIPES 2: edges above it

Search = Literal["exact", "hashes", "vectors"]


@dataclass(frozen=True)
class Rule:
    """A rule with everything a worker needs to apply it to a shard.

    Attributes:
        number: place among the rules.
        entry: place of the entry in the recipe.
        settings: the entry.
        reference: the set that rows are compared with; None for the pool's own copies.
        columns: names of the wide table.
        values: columns that must be equal, or nearly.
        keep_columns: what the ordering reads.
        work: the rule's folder.
        measured: folder of the reference's images, measured (`_references`); empty where it comes as a file.
        released: folders of the last release's members, whose rows come first.
        centroids: file of the pool's cells in which the rule compares; empty where it places its own.
    """

    number: int
    entry: int
    settings: DedupSettings
    reference: ReferenceSettings | None
    columns: Mapping[str, Column]
    values: tuple[str, ...]
    keep_columns: tuple[str, ...]
    measured: str = ""
    work: str = ""
    released: tuple[str, ...] = ()
    centroids: str = ""

    @property
    def kind(self) -> str:
        """`duplicate_kind` of the rows that it removes."""
        return self.settings.by if self.reference is None else f"reference:{self.reference.name}"

    @property
    def search(self) -> Search:
        """How near values are found; exact: equal ones only."""
        if self.settings.by.startswith(EMBEDDING):
            return "vectors"
        return "hashes" if self.radius or self.reference is not None else "exact"

    @property
    def grouped(self) -> bool:
        """Whether rows are searched for near ones among themselves."""
        if self.reference is not None:
            return self.reference.match == "component" and (self.search == "vectors" or self.radius > 0)
        return self.search != "exact"

    @property
    def refreshed(self) -> bool:
        """Whether a refresh knows pairs of old rows, and need not compare them."""
        return self.grouped and self.form != "semdedup"

    @property
    def radius(self) -> int:
        """Bits."""
        return self.settings.radius if self.reference is None else self.reference.radius

    @property
    def form(self) -> Literal["threshold", "dinov2", "semdedup"]:
        """Of a search among the pool's own vectors; a reference's components are never SemDeDup's."""
        return "threshold" if self.reference is not None and self.semdedup else self.settings.form

    @property
    def semdedup(self) -> bool:
        """Whether the entry is SemDeDup's."""
        return self.settings.form == "semdedup"

    @property
    def threshold(self) -> float:
        """Cosine."""
        if self.reference is not None:
            return self.reference.threshold or 0.0
        if self.semdedup:
            return 1 - (self.settings.eps or 0.0)
        return DINOV2_THRESHOLD if self.settings.threshold is None else self.settings.threshold

    @property
    def words(self) -> str:
        """What makes rows copies, for people."""
        same = " and ".join(self.values)
        if self.search == "vectors":
            return f"cosine of {same} {'from' if self.form == 'threshold' else 'above'} {self.threshold:g}"
        return f"same {same}" if not self.radius else f"{same} within {self.radius} bits"


def image_references(settings: Sequence[DedupSettings], columns: Mapping[str, Column]) -> dict[str, tuple[str, str]]:
    """Place in the recipe to (images, column that measures them) of each reference set that comes as images.

    Raises PlanError as `rules_of` does.
    """
    return {
        reference_place(rule): (rule.reference.images, rule.values[0])
        for rule in rules_of(settings, columns)
        if rule.reference is not None and rule.reference.images is not None
    }


def rules_of(
    settings: Sequence[DedupSettings], columns: Mapping[str, Column], measured: Mapping[str, str] | None = None,
    centroids: tuple[str, str] | None = None,
) -> list[Rule]:  # fmt: skip
    """The rules of these entries; `measured` as `Rule` has it, by the reference's place in the recipe; `centroids`: the
    column and the file of the pool's cells.

    Raises PlanError for an unknown kind, column or setting.
    """
    schema = schema_of(columns)
    rules: list[Rule] = []
    for number, entry in enumerate(settings):
        place = f"dedup.{number}"
        values = _values(place, entry, columns)
        _check(place, entry)
        shared = ""
        if entry.cells == "pool" and centroids is not None:
            by, shared = centroids
            if (by,) != values:
                raise PlanError(f"{place}.cells: pool: the section `cells` is of {by}, and {entry.by} of {values[0]}")
        try:
            keep = tuple(names_in(entry.keep, schema))
        except PlanError as error:
            raise PlanError(f"{place}.keep: {error}") from None
        references = [None, *entry.against] if entry.within else list(entry.against)
        if not references:
            raise PlanError(f"{place}.within: false leaves nothing to compare; name a set in `against`")
        for one in references:
            rule = Rule(len(rules), number, entry, one, columns, values, keep)
            held = (measured or {}).get(reference_place(rule), "")
            rules.append(replace(rule, measured=held, centroids=shared))
    return rules


def reference_place(rule: Rule) -> str:
    """Where the recipe names a rule's reference set."""
    return f"dedup.{rule.entry}.against.{rule.reference.name if rule.reference else ''}"


def sums_of(rules: Sequence[Rule]) -> dict[str, str]:
    """sha256 of each reference's file, or the folder that its images are measured in. Raises PlanError when a file
    cannot be read or holds no images of its kind, and when nothing measures the images."""
    sums = {}
    for rule in rules:
        if rule.reference is not None:
            place, name = reference_place(rule), f"{rule.number}:{rule.reference.name}"
            if rule.reference.images is not None:
                if not rule.measured:
                    raise PlanError(f"{place}.images: this pipeline measures no images of references; see frame.py")
                sums[name] = rule.measured
                continue
            found = read_reference(rule.reference, place)
            column = rule.columns[rule.values[0]].type
            if rule.search == "vectors" and found.values.shape[1] != column.list_size:
                raise PlanError(f"{place}: vectors of {found.values.shape[1]}, {rule.values[0]} has {column.list_size}")
            sums[name] = sum_of(rule.reference, place)
    return sums


def _values(place: str, entry: DedupSettings, columns: Mapping[str, Column]) -> tuple[str, ...]:
    if entry.by.startswith(EMBEDDING):
        return (_vector_column(place, entry.by.removeprefix(EMBEDDING), columns),)
    needed = EXACT.get(entry.by)
    if needed is None:
        raise PlanError(f"{place}.by: {entry.by!r} is not one of {', '.join(EXACT)}, {EMBEDDING}<name>")
    for name in needed:
        if name not in columns:
            raise PlanError(
                f"{place}.by: {entry.by} needs the column {name}, which no table has; "
                "add the scorer that writes it, e.g. score: {phash: {scorer: phash}}"
            )
    return needed


def _vector_column(place: str, name: str, columns: Mapping[str, Column]) -> str:
    """`<name>_image` of the table `embeddings_<name>`, or its first column of vectors."""
    mine = [
        wide
        for wide, column in columns.items()
        if column.table.name == f"embeddings_{name}" and pa.types.is_fixed_size_list(column.type)
    ]
    if mine:
        return f"{name}_image" if f"{name}_image" in mine else mine[0]
    tables = {column.table.name for column in columns.values()}
    known = sorted(table for table in tables if table.startswith("embeddings_"))
    raise PlanError(
        f"{place}.by: {EMBEDDING}{name} needs the table embeddings_{name}, which no stage writes; "
        f"there are: {', '.join(known) or 'none'}"
    )


def _check(place: str, entry: DedupSettings) -> None:
    """Raise PlanError for settings that this kind of entry does not read, or lacks."""
    vectors = entry.by.startswith(EMBEDDING)
    if entry.radius and entry.by != "image_phash":
        raise PlanError(f"{place}.radius: only image_phash has one; {entry.by} compares otherwise")
    if not vectors and entry.form != "threshold":
        raise PlanError(f"{place}.form: {entry.form} is a form of {EMBEDDING}<name>, not of {entry.by}")
    reads = {"semdedup": ("eps", "cells"), "dinov2": ("threshold",), "threshold": ("threshold",)}[entry.form]
    for name in ("threshold", "eps", "cells"):
        if getattr(entry, name) not in (None, "pool" if vectors else None) and not (vectors and name in reads):
            raise PlanError(f"{place}.{name}: {entry.by} in the form {entry.form} compares without one; leave it out")
    required = {"semdedup": "eps", "threshold": "threshold"}.get(entry.form)
    if vectors and entry.within and required and getattr(entry, required) is None:
        example = "0.03" if required == "eps" else "0.75, sscd_disc_mixup at 90 % precision"
        raise PlanError(f"{place}.{required}: required by the form {entry.form} of {entry.by}, e.g. {example}")
    if len({one.name for one in entry.against}) < len(entry.against):
        raise PlanError(f"{place}.against: two sets have one name")
    for one in entry.against:
        _check_reference(f"{place}.against.{one.name}", entry.by, vectors, one)


def _check_reference(place: str, by: str, vectors: bool, one: ReferenceSettings) -> None:
    if not vectors and by in ("sha256", "url"):
        raise PlanError(f"{place}: {by} is compared with no reference; image_phash and {EMBEDDING}<name> are")
    wanted, other = ("embeddings", "hashes") if vectors else ("hashes", "embeddings")
    if [name for name in ("hashes", "embeddings", "images") if getattr(one, name)] not in ([wanted], ["images"]):
        raise PlanError(
            f"{place}: {by} is compared with a file of {wanted}, or with images; write `{wanted}` or `images`, and not "
            f"`{other}`"
        )
    if vectors and one.threshold is None:
        raise PlanError(f"{place}.threshold: required for embeddings, e.g. 0.45")
    if (vectors and one.radius) or (not vectors and one.threshold is not None):
        raise PlanError(f"{place}: `radius` is for hashes, `threshold` for embeddings")


def key_columns(rule: Rule) -> list[str]:
    """The keep columns without `key`, which every table has."""
    return [name for name in rule.keep_columns if name != KEY.name]

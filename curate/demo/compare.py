"""Compare what a run found with what was planted, kind by kind, because a demo that only ends proves little.

Arrow tables in, counts out; the small web has few rows, so plain dictionaries join them. It refuses to excuse: a kind
that the run missed is printed like any other, and so are pictures that were wrongly called duplicates.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from curate.demo.planting import COPY_KINDS, COUNTS
from curate.schema import OK

Row = dict[str, Any]

SELECTED: Final = ("shapes", "scene")
FETCHED: Final = ("document", "chart", "sign", "watermarked", "redirected")


@dataclass(frozen=True)
class Finding:
    """Of `planted` samples of a kind, `found` met the question; `right` is how many should."""

    kind: str
    question: str
    planted: int
    found: int
    right: int
    is_exact: bool = False  # a status that was planted: anything but `right` is a fault, not a matter of thresholds

    @property
    def is_right(self) -> bool:
        """Whether everything was found, or nothing where nothing should be."""
        return self.found == self.right


def compare(
    truth: pa.Table,
    samples: pa.Table,
    images: pa.Table,
    duplicates: pa.Table | None,
    members: Mapping[str, pa.Table],
) -> list[Finding]:
    """What a run made of each kind in `truth` (`web.TRUTH_SCHEMA`), in the order of `planting.COUNTS`.

    Args:
        truth: one row per row of the URL table.
        samples: `key`, after ingest.
        images: `key`, `status`.
        duplicates: `key`, `is_duplicate`, `duplicate_of`; None when the run looked for none.
        members: for each subset that promises captioned pictures, `key` and `member` (bool).
    """
    planted: dict[str, list[Row]] = {kind: [] for kind in COUNTS}
    for row in truth.to_pylist():
        planted[row["kind"]].append(row)
    status = dict(zip(images["key"].to_pylist(), images["status"].to_pylist(), strict=True))
    chosen = {row["key"] for table in members.values() for row in table.to_pylist() if row["member"]}
    copy_of = {} if duplicates is None else copies_in(duplicates)
    group_of = {row["key"]: row["duplicate_group"] for rows in planted.values() for row in rows}

    findings = []
    for kind, rows in planted.items():
        keys = [row["key"] for row in rows]
        if kind == "repeated_row":
            found = removed(Counter(truth["key"].to_pylist()), Counter(samples["key"].to_pylist()), keys)
            findings.append(replace(all_of(kind, "removed in ingest", rows, found), is_exact=True))
        elif kind in COPY_KINDS:
            if duplicates is not None:
                findings.append(all_of(kind, "called a duplicate", rows, flagged(rows, copy_of, group_of)))
        elif kind == "wrong_caption":
            findings.append(all_of(kind, "kept out of the subsets", rows, sum(key not in chosen for key in keys)))
        elif kind in SELECTED:
            single = [row for row in rows if row["duplicate_group"] is None]
            kept = sum(row["key"] in chosen for row in single)
            findings.append(all_of(kind, "true caption, selected", single, kept))
        elif kind in FETCHED:
            findings.append(status_of(kind, "fetched", rows, status))
        else:
            said = sorted({name for row in rows for name in row["expected_status"]})
            findings.append(status_of(kind, f"refused as {' or '.join(said)}", rows, status))
    if duplicates is not None:
        single_keys = [key for key, group in group_of.items() if group is None and status.get(key) == OK]
        wrongly = sum(key in copy_of for key in single_keys)
        findings.append(Finding("no copy", "wrongly called a duplicate", len(single_keys), wrongly, right=0))
    return findings


def all_of(kind: str, question: str, rows: list[Row], found: int) -> Finding:
    """A finding that is right when it holds for every planted row."""
    return Finding(kind, question, len(rows), found, right=len(rows))


def status_of(kind: str, question: str, rows: list[Row], status: Mapping[str, str]) -> Finding:
    """How many of the rows have a status that is right for them."""
    met = sum(status.get(row["key"]) in row["expected_status"] for row in rows)
    return replace(all_of(kind, question, rows, met), is_exact=True)


def copies_in(duplicates: pa.Table) -> dict[str, str]:
    """Key of each duplicate → key of the sample that was kept instead."""
    return {row["key"]: row["duplicate_of"] for row in duplicates.to_pylist() if row["is_duplicate"]}


def removed(in_table: Counter[str], in_samples: Counter[str], keys: Iterable[str]) -> int:
    """How many of the repeated rows with these keys ingest left out."""
    return sum(in_table[key] - in_samples[key] for key in set(keys) if in_samples[key])


def flagged(rows: list[Row], copy_of: Mapping[str, str], group_of: Mapping[str, str | None]) -> int:
    """Duplicates found in the groups of these copies, and no more of a group than were planted in it.

    Which picture of a group stays is the recipe's choice, so the one that was copied counts as well as its copies.
    """
    copies = Counter(row["duplicate_group"] for row in rows)
    hits = Counter(group_of.get(key) for key, kept in copy_of.items() if group_of.get(key) == group_of.get(kept))
    return sum(min(count, hits[group]) for group, count in copies.items())


def print_findings(findings: Iterable[Finding], console: Console) -> None:
    """Print "found / planted" for each kind, and mark what differs from what is right."""
    table = Table(title="What was planted, and what the run made of it")
    table.add_column("kind")
    table.add_column("asked")
    table.add_column("found / planted", justify="right")
    table.add_column("")
    for finding in findings:
        verdict = (
            "" if finding.is_right else f"{abs(finding.found - finding.right)} {'missed' if finding.right else 'false'}"
        )
        table.add_row(finding.kind, finding.question, f"{finding.found} / {finding.planted}", verdict)
    console.print(table)

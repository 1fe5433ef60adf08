"""Ready-made entries of `score:` by their usual names: what `curate score --with` understands without a recipe.

One literal dict; the same lines can be written into a recipe. An entry is found by its own name, by its scorer's name,
or by one of its columns.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curate.errors import CurateError, PlanError
from curate.score.pool_counts import POOL_COUNTS
from curate.score.registry import build
from curate.score.scorer import FeatureScorer, Scorer

Section = Mapping[str, Mapping[str, Any]]

ENTRIES: dict[str, dict[str, Any]] = {
    "clip_vitb32": {"scorer": "clip", "model": "ViT-B-32-quickgelu", "pretrained": "openai"},
    "clip_vitl14": {"scorer": "clip", "model": "ViT-L-14-quickgelu", "pretrained": "openai"},
    "aesthetic": {"scorer": "laion_aesthetic_v2", "features": "clip_vitl14"},
    "aesthetic_v1": {"scorer": "laion_aesthetic_v1", "features": "clip_vitl14"},
    "unsafe": {"scorer": "laion_nsfw", "features": "clip_vitl14"},
    "phash": {"scorer": "phash"},
    "text_stats": {"scorer": "text_stats"},
    "text_tokens": {"scorer": "text_stats", "tokenizers": {"bert": "bert-base-uncased", "gpt": "gpt2"}},
    "faces": {"scorer": "faces"},
    "text": {"scorer": "text_density"},
    "text_read": {"scorer": "text_density", "recognize": True},
    "text_facts": {"scorer": "text_facts"},
    "image_facts": {"scorer": "image_facts"},
    "watermark": {"scorer": "watermark"},
    "opennsfw2": {"scorer": "opennsfw2"},
    "gantman": {"scorer": "gantman"},
    "text_masked": {"scorer": "clip_text_masked", "model": "ViT-L-14-quickgelu", "pretrained": "openai"},
    "webssl_light": {"scorer": "vlm_yes_no", "prompt": "webssl_light"},
    "webssl_heavy": {"scorer": "vlm_yes_no", "prompt": "webssl_heavy"},
    "sscd": {"scorer": "torchscript_embed", "weights": "sscd-disc-mixup"},
    "dinov2": {"scorer": "hf_embed", "model": "facebook/dinov2-base"},
}


@dataclass(frozen=True)
class Choice:
    """What to compute (`section`, features included) and which columns to show."""

    section: dict[str, Mapping[str, Any]]
    columns: list[str]


def choose(names: Sequence[str], own: Section | None = None) -> Choice:
    """The entries behind these names. `own` are a recipe's entries, which come before the ready-made ones.

    Raises PlanError with near names for one that nothing answers to.
    """
    known = {**ENTRIES, **(own or {})}
    order = [*(own or {}), *(name for name in ENTRIES if name not in (own or {}))]
    found = {name: _built(name, known) for name in order}
    columns = {name: [f.name for f in (*scorer.fields, *scorer.embeddings)] for name, scorer in found.items() if scorer}
    section: dict[str, Mapping[str, Any]] = {}
    shown: list[str] = []
    for name in names:
        entry = _answering(name, known, columns)
        scorer = found[entry]
        if scorer is None:
            build({entry: known[entry]})  # raises what is wrong with it
            raise PlanError(f"--with {name}: score.{entry} could not be built")
        if isinstance(scorer, FeatureScorer):
            section.setdefault(scorer.source, known[scorer.source])
        section.setdefault(entry, known[entry])
        whole = name in (entry, known[entry]["scorer"])  # `text_density` is a scorer of three columns, and one of them
        wanted = ([f.name for f in scorer.fields] or columns[entry]) if whole else [name]
        shown += [column for column in wanted if column not in shown]
    wider = {name for name in section for other in section if set(columns[name]) < set(columns[other])}
    return Choice({name: entry for name, entry in section.items() if name not in wider}, shown)


def _built(name: str, known: Section) -> Scorer | None:
    """The scorer of an entry; None when it cannot be built, e.g. because its weights are not on this machine."""
    source = str(known[name].get("features"))
    needed = {source: known[source]} if source in known else {}
    try:
        return build({**needed, name: known[name]})[-1]
    except CurateError:
        return None


def _answering(name: str, known: Section, columns: Mapping[str, Sequence[str]]) -> str:
    if name in known:
        return name
    for entry, held in columns.items():
        if name in held or known[entry]["scorer"] == name:
            return entry
    if name in POOL_COUNTS:
        raise PlanError(
            f"--with {name}: is counted over a whole pool; write it into a recipe's `score:` (`curate run`)"
        )
    names = sorted({*known, *(column for held in columns.values() for column in held)})
    near = difflib.get_close_matches(name, names, 3) or names
    raise PlanError(f"--with {name}: no scorer or column of that name; there are {', '.join(near)}")

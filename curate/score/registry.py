"""Every scorer by the name that a recipe uses, and the way from the `score:` section to scorers.

A new scorer is one file, one entry here, one line of YAML. Declarations only: no model is loaded, no weights are read.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from curate.errors import ConfigError
from curate.score.clip import ClipScorer
from curate.score.detectors import FacesScorer, GantmanScorer, OpenNsfwScorer, TextDensityScorer, WatermarkScorer
from curate.score.facts import ImageFactsScorer, TextFactsScorer
from curate.score.heads import AestheticV1Scorer, AestheticV2Scorer, LaionNsfwScorer
from curate.score.phash import PhashScorer
from curate.score.scorer import FeatureScorer, Scorer
from curate.score.text_classifier import TextClassifierScorer
from curate.score.text_embed import TextEmbedScorer
from curate.score.text_mask import TextMaskedScorer
from curate.score.text_stats import TextStatsScorer
from curate.score.vision import (
    HfClassifierScorer,
    HfEmbedScorer,
    OnnxEmbedScorer,
    OnnxScorer,
    TimmEmbedScorer,
    TimmScorer,
    TorchScriptEmbedScorer,
)
from curate.score.vlm import VlmScorer
from curate.score.wordnet import SynsetWordsScorer
from curate.score.zero_shot import ZeroShotScorer

SCORERS: dict[str, type[Scorer]] = {
    "clip": ClipScorer,
    "phash": PhashScorer,
    "text_stats": TextStatsScorer,
    "text_facts": TextFactsScorer,
    "synset_words": SynsetWordsScorer,
    "hf_text_classifier": TextClassifierScorer,
    "hf_text_embed": TextEmbedScorer,
    "image_facts": ImageFactsScorer,
    "clip_text_masked": TextMaskedScorer,
    "laion_aesthetic_v2": AestheticV2Scorer,
    "laion_aesthetic_v1": AestheticV1Scorer,
    "laion_nsfw": LaionNsfwScorer,
    "faces": FacesScorer,
    "text_density": TextDensityScorer,
    "watermark": WatermarkScorer,
    "opennsfw2": OpenNsfwScorer,
    "gantman": GantmanScorer,
    "clip_zero_shot": ZeroShotScorer,
    "vlm_yes_no": VlmScorer,
    "hf_classifier": HfClassifierScorer,
    "hf_embed": HfEmbedScorer,
    "timm_classifier": TimmScorer,
    "timm_embed": TimmEmbedScorer,
    "torchscript_embed": TorchScriptEmbedScorer,
    "onnx_classifier": OnnxScorer,
    "onnx_embed": OnnxEmbedScorer,
}


def build(section: Mapping[str, Mapping[str, Any]]) -> list[Scorer]:
    """The scorers of a recipe's `score:` section, in its order.

    Raises ConfigError naming `score.<entry>.<key>` for an unknown scorer, key, value or `features`, and when two
    entries write the same column.
    """
    scorers = [_scorer(name, entry) for name, entry in section.items()]
    by_name = {scorer.name: scorer for scorer in scorers}
    for scorer in scorers:
        if isinstance(scorer, FeatureScorer):
            source = by_name.get(scorer.source)
            if source is None or not any(field.name == f"{source.name}_image" for field in source.embeddings):
                names = [name for name, other in by_name.items() if other.embeddings]
                raise ConfigError(
                    f"score.{scorer.name}.features: {scorer.source!r} is no entry with image embeddings; "
                    f"there are {', '.join(names) or 'none'}"
                )
            scorer.bind(source)
    _refuse_shared_columns(scorers)
    return scorers


def kind_of(scorer: Scorer) -> str:
    """The recipe's name of a scorer's class."""
    return next(kind for kind, known in SCORERS.items() if known is type(scorer))


def _scorer(name: str, entry: Mapping[str, Any]) -> Scorer:
    settings = dict(entry)
    kind = settings.pop("scorer", None)
    if kind is None:
        raise ConfigError(f"score.{name}.scorer: required; one of {', '.join(SCORERS)}")
    if not isinstance(kind, str) or kind not in SCORERS:
        near = difflib.get_close_matches(str(kind), SCORERS, 3) or list(SCORERS)
        raise ConfigError(f"score.{name}.scorer: no scorer {kind!r}; near: {', '.join(near)}")
    known = SCORERS[kind]
    try:
        checked = known.settings_type.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaint(name, known, item) for item in error.errors())) from None
    return known(name, checked)


def _complaint(name: str, known: type[Scorer], item: Any) -> str:
    key = ".".join(["score", name, *(str(part) for part in item["loc"])])
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key; it takes {', '.join(known.settings_type.model_fields) or 'no settings'}"
    if item["type"] == "missing":
        return f"{key}: required, and not there"
    return f"{key}: {item['msg']}; found {item['input']!r}"[:500]


def _refuse_shared_columns(scorers: list[Scorer]) -> None:
    writers: dict[str, str] = {}
    for scorer in scorers:
        for field in (*scorer.fields, *scorer.embeddings):
            if field.name in writers:
                raise ConfigError(
                    f"score.{scorer.name}: column {field.name} is written by score.{writers[field.name]} as well; "
                    "rename one with `column:`"
                )
            writers[field.name] = scorer.name

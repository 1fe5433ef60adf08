"""Heads on CLIP features as scorers: `laion_aesthetic_v2`, `laion_aesthetic_v1`, `laion_nsfw`.

They read what a `clip` entry embeds, so a head costs no pixel: `{scorer: laion_aesthetic_v2, features: clip_vitl14}`.
The heads were trained on OpenAI's CLIP; features of another model give numbers without meaning, and are refused.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from curate.errors import ConfigError
from curate.score.clip import ClipScorer
from curate.score.scorer import Device, FeatureScorer, Float32, Scorer, ScorerSettings, Values
from curate.score.weight_ref import WeightRef

Head = Callable[[Float32], Float32]


class HeadSettings(ScorerSettings):
    """`features`: the `clip` entry; `weights`: another published file than the default, by manifest name or path."""

    features: str
    weights: str | None = None
    column: str | None = None


class HeadScorer(FeatureScorer):
    """One published head. Subclasses say which, for which model, and how it is read."""

    settings_type: ClassVar[type[ScorerSettings]] = HeadSettings
    column: ClassVar[str]
    weights_by_model: ClassVar[Mapping[str, str]]  # CLIP architecture: manifest name

    def __init__(self, name: str, settings: HeadSettings) -> None:
        super().__init__(name, settings)
        self.source = settings.features
        self._column = settings.column or self.column
        self._named = settings.weights
        self._weights: WeightRef | None = None
        self._head: Head | None = None

    @abstractmethod
    def open(self, path: Path) -> Head:
        """Read the published file."""

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """One float column."""
        return (pa.field(self._column, pa.float32()),)

    @property
    def weights(self) -> WeightRef:
        """The file, after `bind`."""
        if self._weights is None:
            raise RuntimeError(f"{self.name}: bind() was not called")
        return self._weights

    def bind(self, source: Scorer) -> None:
        """Choose the file that was trained on the source's features. Raises ConfigError."""
        where = f"score.{self.name}"
        if not isinstance(source, ClipScorer):
            raise ConfigError(f"{where}.features: {source.name} is no CLIP model")
        clip = source.source
        if clip.pretrained is not None and clip.file is None and clip.pretrained != "openai":
            raise ConfigError(
                f"{where}.features: the head was trained on OpenAI's features, not on {clip.pretrained}'s"
            )
        architecture = clip.model.removesuffix("-quickgelu")
        chosen = self._named or self.weights_by_model.get(architecture)
        if chosen is None:
            known = ", ".join(self.weights_by_model)
            raise ConfigError(f"{where}.weights: required for features of {clip.model}; published for {known}")
        self._weights = WeightRef(f"{where}.weights", chosen)

    def identity(self) -> Mapping[str, Any]:
        """The file by content."""
        return {"weights": self.weights.sha256}

    def check(self) -> None:
        """Raises WeightsError."""
        self.weights.path()

    def load(self, device: Device) -> None:
        """Read the file."""
        self._head = self.open(self.weights.path())

    def score(self, features: Float32) -> Mapping[str, Values]:
        """One number a row."""
        if self._head is None:
            raise RuntimeError(f"{self.name}: load() was not called")
        try:
            return {self._column: self._head(features)}
        except ValueError as error:  # heads raise it for features of another length alone
            raise ConfigError(f"score.{self.name}.features: {self.source} does not fit the head: {error}") from None


class AestheticV2Scorer(HeadScorer):
    """RECIPES 12.1; about 1 to 10."""

    column = "aesthetic_score_laion_v2"
    weights_by_model: ClassVar[Mapping[str, str]] = {"ViT-L-14": "aesthetic-v2-sac-logos-ava1-l14-linear"}

    def open(self, path: Path) -> Head:
        """An AestheticHead."""
        from curate.score.aesthetic import AestheticHead  # noqa: PLC0415  # torch: on workers only

        return AestheticHead.from_file(path)


class AestheticV1Scorer(AestheticV2Scorer):
    """RECIPES 12.2; about 1 to 10."""

    column = "aesthetic_score_laion_v1"
    weights_by_model: ClassVar[Mapping[str, str]] = {
        "ViT-L-14": "aesthetic-v1-l14",
        "ViT-B-32": "aesthetic-v1-b32",
        "ViT-B-16": "aesthetic-v1-b16",
    }


class LaionNsfwScorer(HeadScorer):
    """RECIPES 12.3; probability."""

    column = "punsafe"
    weights_by_model: ClassVar[Mapping[str, str]] = {"ViT-L-14": "laion-nsfw-l14", "ViT-B-32": "laion-nsfw-b32"}

    def open(self, path: Path) -> Head:
        """A LaionNsfwHead."""
        from curate.score.nsfw import LaionNsfwHead  # noqa: PLC0415  # on workers only

        return LaionNsfwHead.from_zip(path)

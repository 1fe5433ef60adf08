"""`clip_zero_shot`: probabilities of labels that are declared in YAML as prompts, on a `clip` entry's features.

    safety: {scorer: clip_zero_shot, features: clip_vitl14, prompts: {nude: [nude, naked], weapon: a weapon, other: …}}

Columns `p_<label>`: softmax over the labels of the model's own scale times the cosine. A label with several prompts is
their mean direction, as in CLIP's prompt ensembles (Radford et al. 2021, 3.1.4). The vision tower is not run again.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from curate.errors import ConfigError
from curate.score.clip import ClipScorer
from curate.score.scorer import Device, FeatureScorer, Float32, ModelSettings, Scorer, ScorerSettings, Values

Label = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


class ZeroShotSettings(ModelSettings):
    """`features`: the `clip` entry; `prompts`: label to one prompt or several, at least two labels."""

    features: str
    prompts: Annotated[dict[Label, str | list[str]], Field(min_length=2)]


class ZeroShotScorer(FeatureScorer):
    """Embeds the prompts once, at loading."""

    settings_type: ClassVar[type[ScorerSettings]] = ZeroShotSettings

    def __init__(self, name: str, settings: ZeroShotSettings) -> None:
        super().__init__(name, settings)
        self.source = settings.features
        self._prompts = {label: [one] if isinstance(one, str) else one for label, one in settings.prompts.items()}
        self._clip: ClipScorer | None = None
        self._directions: Float32 | None = None
        self._scale = 1.0

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """A probability a label."""
        return tuple(pa.field(f"p_{label}", pa.float32()) for label in self._prompts)

    def bind(self, source: Scorer) -> None:
        """Take the text tower of the entry that embeds. Raises ConfigError."""
        if not isinstance(source, ClipScorer):
            raise ConfigError(f"score.{self.name}.features: {source.name} is no CLIP model")
        self._clip = source

    def identity(self) -> Mapping[str, Any]:
        """The prompts in order; the model is named by the features."""
        return {"prompts": list(self._prompts.items())}

    def load(self, device: Device) -> None:
        """Embed the prompts."""
        from curate.score.clip_model import open_model  # noqa: PLC0415  # torch: on workers only

        if self._clip is None:
            raise RuntimeError(f"{self.name}: bind() was not called")
        model = open_model(self._clip.source, device, self._clip.settings.precision)
        means = [
            model.embed_texts(np.stack([model.tokens(prompt) for prompt in prompts])).mean(axis=0)
            for prompts in self._prompts.values()
        ]
        directions = np.stack(means)
        self._directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        self._scale = model.scale

    def score(self, features: Float32) -> Mapping[str, Values]:
        """`p_<label>` of unit features float32 [N, d]."""
        if self._directions is None:
            raise RuntimeError(f"{self.name}: load() was not called")
        logits = self._scale * features @ self._directions.T
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        names: Sequence[str] = [field.name for field in self.fields]
        return {name: shares[:, place] for place, name in enumerate(names)}

"""`hf_text_classifier`: any `transformers` text classifier on captions; the way to DataComp's text safety rule.

    toxic: {scorer: hf_text_classifier, model: unitary/multilingual-toxic-xlm-roberta,
            activation: sigmoid, greatest: text_unsafe}

Columns `p_<label>`, softmax, or sigmoid where the configuration says multi-label; `greatest` names one more column with
the greatest of them, as DataComp reads Detoxify (its multilingual model is the one above; RECIPES 11).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from curate.errors import ConfigError
from curate.score.hub_model import HubModel
from curate.score.scorer import Device, ModelSettings, ScorerSettings, TextScorer, Values
from curate.score.vision import column_names

if TYPE_CHECKING:
    from curate.score.text_model import TextClassifier


class TextClassifierSettings(ModelSettings):
    """`activation`: `auto` as the model's configuration says; Detoxify's own is sigmoid."""

    model: str
    activation: Literal["auto", "softmax", "sigmoid"] = "auto"
    greatest: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")] | None = None


class TextClassifierScorer(TextScorer):
    """Each distinct text of a batch once."""

    settings_type: ClassVar[type[ScorerSettings]] = TextClassifierSettings

    def __init__(self, name: str, settings: TextClassifierSettings) -> None:
        super().__init__(name, settings)
        self._settings = settings
        self._source = HubModel(f"score.{name}.model", settings.model)
        labels = self._source.config.get("id2label")
        if not labels:
            raise ConfigError(f"score.{name}.model: {settings.model} names no labels; it is no classifier")
        self._labels = column_names([labels[key] for key in sorted(labels, key=int)])
        self._model: TextClassifier | None = None

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """A probability a label, and the greatest."""
        names = [f"p_{label}" for label in self._labels] + [self._settings.greatest] * bool(self._settings.greatest)
        return tuple(pa.field(name, pa.float32()) for name in names)

    def identity(self) -> Mapping[str, Any]:
        """The model and how its numbers are read."""
        return {**self._source.identity(), "activation": self._settings.activation}

    def check(self) -> None:
        """Raises WeightsError."""
        self._source.check()

    def load(self, device: Device) -> None:
        """Load model and tokenizer."""
        from curate.score.text_model import TextClassifier  # noqa: PLC0415  # torch: on workers only

        batch = self._settings.batch_size or (256 if device.name == "cuda" else 16)
        self._model = TextClassifier(self._source.source, self._settings.activation, device, batch)

    def unload(self) -> None:
        """Drop the model."""
        self._model = None

    def score(self, texts: Sequence[str]) -> Mapping[str, Values]:
        """`p_<label>` and the greatest."""
        if self._model is None:
            raise RuntimeError(f"{self.name}: load() was not called")
        shares = self._model.probabilities(texts)
        columns: dict[str, Values] = {f"p_{label}": shares[:, place] for place, label in enumerate(self._labels)}
        if self._settings.greatest:
            columns[self._settings.greatest] = np.max(shares, axis=1)
        return columns

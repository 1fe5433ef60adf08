"""`hf_text_embed`: captions as vectors, by any `transformers` text encoder.

    simcse: {scorer: hf_text_embed, model: princeton-nlp/sup-simcse-bert-base-uncased}

`embeddings_simcse` then holds `simcse_text`, float16 unit vectors: what MoDE clusters (RECIPES 7: the pooler's output,
normalised). `pool` says which vector is the text's: that of the `pooler`, of the `first` token, or the tokens' `mean`.
A model without a pooler of its own, which transformers would make up at random, is refused.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from curate.score.hub_model import HubModel
from curate.score.scorer import Device, ModelSettings, ScorerSettings, TextScorer, Values

if TYPE_CHECKING:
    from curate.score.text_model import TextEncoder


class TextEmbedSettings(ModelSettings):
    """`model`: a repository of the hub that is cached here, or a folder; `max_tokens`: longer texts are cut."""

    model: str
    pool: Literal["pooler", "first", "mean"] = "pooler"
    max_tokens: Annotated[int, Field(gt=0)] = 512


class TextEmbedScorer(TextScorer):
    """Each distinct text of a batch once."""

    settings_type: ClassVar[type[ScorerSettings]] = TextEmbedSettings

    def __init__(self, name: str, settings: TextEmbedSettings) -> None:
        super().__init__(name, settings)
        self._settings = settings
        self._source = HubModel(f"score.{name}.model", settings.model)
        self._width = int(self._source.config["hidden_size"])
        self._model: TextEncoder | None = None

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """None: it only embeds."""
        return ()

    @property
    def embeddings(self) -> tuple[pa.Field, ...]:
        """`<entry>_text`."""
        return (pa.field(f"{self.name}_text", pa.list_(pa.float16(), self._width)),)

    def identity(self) -> Mapping[str, Any]:
        """The model, and which of its vectors."""
        return {**self._source.identity(), "pool": self._settings.pool, "max_tokens": self._settings.max_tokens}

    def check(self) -> None:
        """Raises WeightsError."""
        self._source.check()

    def load(self, device: Device) -> None:
        """Load encoder and tokenizer. Raises PlanError for a pooler that the model does not have."""
        from curate.score.text_model import TextEncoder  # noqa: PLC0415  # torch: on workers only

        settings = self._settings
        batch = settings.batch_size or (256 if device.name == "cuda" else 16)
        self._model = TextEncoder(self._source.source, settings.pool, settings.max_tokens, device, batch)

    def unload(self) -> None:
        """Drop the model."""
        self._model = None

    def score(self, texts: Sequence[str]) -> Mapping[str, Values]:
        """Unit vectors float32 [N, d]."""
        if self._model is None:
            raise RuntimeError(f"{self.name}: load() was not called")
        return {f"{self.name}_text": self._model.vectors(texts)}

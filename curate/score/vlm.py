"""`vlm_yes_no`: a vision-language model is asked one question; `p_yes_<entry>` = P(yes) / (P(yes) + P(no)).

The probabilities are those of the answer's first token, summed over the ways in which the tokenizer writes yes and no;
nothing is generated. Web-SSL's two prompts (paper 2504.01017, app. A; RECIPES 1) are in PROMPTS, verbatim. The paper
names SmolVLM2 but neither its size nor how answers were read: the default is the 2.2B model, and the score is a number,
so that the share that a recipe keeps (50.3 %, 1.3 %) can be set by `keep_top`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import pyarrow as pa
from pydantic import Field

from curate.score.decode import Picture, Unscorable
from curate.score.hub_model import HubModel
from curate.score.scorer import Device, ImageScorer, ModelSettings, ScorerSettings, Values

if TYPE_CHECKING:
    from curate.score.vlm_model import Question, VlmModel

PROMPTS = {
    "webssl_light": "Does this image contain any readable text? Answer only yes or no.",
    "webssl_heavy": (
        "Please think carefully before answering. Does this image contain charts, tables, or documents with readable "
        "text? Answer only yes or no."
    ),
}


class VlmSettings(ModelSettings):
    """`prompt`: a name of PROMPTS, or the question itself."""

    prompt: Annotated[str, Field(min_length=1)]
    model: str = "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
    column: str | None = None


class VlmScorer(ImageScorer["Question"]):
    """One question to one model."""

    settings_type: ClassVar[type[ScorerSettings]] = VlmSettings

    def __init__(self, name: str, settings: VlmSettings) -> None:
        super().__init__(name, settings)
        self.prompt = PROMPTS.get(settings.prompt, settings.prompt)
        self.source = HubModel(f"score.{name}.model", settings.model)
        self._settings = settings
        self._column = settings.column or f"p_yes_{name}"
        self._model: VlmModel | None = None

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """One probability."""
        return (pa.field(self._column, pa.float32()),)

    def identity(self) -> Mapping[str, Any]:
        """The model and the words."""
        return {**self.source.identity(), "prompt": self.prompt}

    def check(self) -> None:
        """Raises WeightsError."""
        self.source.check()

    def load(self, device: Device) -> None:
        """Load model and processor."""
        from curate.score.vlm_model import VlmModel  # noqa: PLC0415  # torch: on workers only

        self._model = VlmModel(self.source.source, self.prompt, device)
        self.batch_size = self._settings.batch_size or (16 if device.name == "cuda" else 1)

    def unload(self) -> None:
        """Drop the model."""
        self._model = None

    def prepare(self, picture: Picture, text: str | None) -> "Question | Unscorable":
        """The processor's tensors of one image and the question."""
        return self._loaded().prepare(picture.rgb)

    def score(self, prepared: Sequence["Question"]) -> Mapping[str, Values]:
        """P(yes) of each."""
        return {self._column: self._loaded().ask(prepared)}

    def _loaded(self) -> "VlmModel":
        if self._model is None:
            raise RuntimeError(f"{self.name}: load() was not called")
        return self._model

"""`clip`: similarity of image and text by any open_clip model, with its embeddings.

The entry `clip_vitl14: {scorer: clip, model: ViT-L-14-quickgelu, pretrained: openai}` writes `clip_similarity_vitl14`,
the cosine of the unit vectors in float32, and for models with a sigmoid loss (SigLIP) `clip_probability_vitl14`.
`embeddings_clip_vitl14` holds `clip_vitl14_image` and `clip_vitl14_text`, unit vectors in float16. This file declares
and checks; the model itself is in `clip_model.py`, so that a plan need not load torch.

Models: a name of open_clip with a pretrained tag or a file; `hf-hub:owner/name`; `local-dir:FOLDER`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from curate.score.clip_source import ClipSource
from curate.score.decode import Picture
from curate.score.scorer import GPU_QUEUE, Device, ImageScorer, ModelSettings, Values

if TYPE_CHECKING:
    from curate.score.clip_model import ClipModel

CPU_BATCH = 32  # larger ones are no faster on a CPU and hold more memory
GPU_BATCH = 256


class ClipSettings(ModelSettings):
    """One model. `column`: another name than `clip_similarity_<entry>`."""

    model: Annotated[str, Field(min_length=1)]
    pretrained: str | None = None
    preprocess: Literal["exact", "fast"] = "exact"  # open_clip's own transform, or one resize on the device
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: fp16 on a GPU, fp32 on a CPU
    embeddings: bool = True
    column: str | None = None


class Pair:
    """One prepared sample: pixels uint8 [h, w, 3], its text and the text's tokens (none without a text)."""

    __slots__ = ("pixels", "text", "tokens")

    def __init__(self, pixels: npt.NDArray[np.uint8], text: str | None, tokens: npt.NDArray[np.int64] | None) -> None:
        self.pixels, self.text, self.tokens = pixels, text, tokens


class ClipScorer(ImageScorer[Pair]):
    """Runs the image tower once per image and the text tower once per distinct text of a shard."""

    version = 2  # texts are cut behind their end
    settings_type = ClipSettings
    reads_text: ClassVar[bool] = True

    def __init__(self, name: str, settings: ClipSettings) -> None:
        super().__init__(name, settings)
        self.settings = settings
        self.source = ClipSource(f"score.{name}", settings.model, settings.pretrained)
        self._short = name.removeprefix("clip_")
        self._column = settings.column or f"clip_similarity_{self._short}"
        self._model: ClipModel | None = None
        self._texts: dict[str, npt.NDArray[np.float32]] = {}
        self._rows = CPU_BATCH

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """Similarity, and the probability where the model has one."""
        names = [self._column] + [f"clip_probability_{self._short}"] * self.source.is_sigmoid
        return tuple(pa.field(name, pa.float32()) for name in names)

    @property
    def embeddings(self) -> tuple[pa.Field, ...]:
        """Unit vectors of image and text."""
        if not self.settings.embeddings:
            return ()
        kind = pa.list_(pa.float16(), self.source.width)
        return (pa.field(f"{self.name}_image", kind), pa.field(f"{self.name}_text", kind))

    def identity(self) -> Mapping[str, Any]:
        """The model by content or published name, and how pixels become numbers."""
        return {
            **self.source.identity(),
            "preprocess": self.settings.preprocess,
            "precision": self.settings.precision,
        }

    def check(self) -> None:
        """Raises WeightsError or ConfigError."""
        self.source.check()

    def load(self, device: Device) -> None:
        """Load both towers."""
        from curate.score.clip_model import open_model  # noqa: PLC0415  # torch: on workers only

        self._model = open_model(self.source, device, self.settings.precision)
        self._rows = self.settings.batch_size or (GPU_BATCH if device.name == "cuda" else CPU_BATCH)
        self.batch_size = self._rows * (GPU_QUEUE if device.name == "cuda" else 1)

    def begin(self) -> None:
        """Forget the last shard's texts."""
        self._texts.clear()

    def unload(self) -> None:
        """Drop the model."""
        self._model = None
        self._texts.clear()

    @property
    def model(self) -> "ClipModel":
        """The loaded model."""
        if self._model is None:
            raise RuntimeError(f"{self.name}: load() was not called")
        return self._model

    def prepare(self, picture: Picture, text: str | None) -> Pair:
        """Resize and tokenize, on a CPU thread; models of one size share the resize."""
        model, exact = self.model, self.settings.preprocess == "exact"
        resize = model.pixels
        pixels = picture.once(resize.name, lambda: resize.resized(picture.rgb)) if exact else picture.pixels
        if text is None or text in self._texts:
            return Pair(pixels, text, None)
        return Pair(pixels, text, self.model.tokens(text))

    def score(self, prepared: Sequence[Pair]) -> Mapping[str, Values]:
        """Cosines, probabilities, unit vectors; null where there is no text."""
        images = self.model.embed_images([pair.pixels for pair in prepared], self.settings.preprocess, self._rows)
        new = {p.text: p.tokens for p in prepared if p.text is not None and p.text not in self._texts}
        if new:
            tokens = [self.model.tokens(text) if found is None else found for text, found in new.items()]
            vectors = self.model.embed_texts(np.stack(tokens))
            self._texts |= dict(zip(new, vectors, strict=True))
        texts = [None if pair.text is None else self._texts[pair.text] for pair in prepared]
        cosines = [None if text is None else float(image @ text) for image, text in zip(images, texts, strict=True)]
        columns: dict[str, Values] = {self._column: cosines}
        if self.source.is_sigmoid:
            columns[f"clip_probability_{self._short}"] = self.model.probabilities(cosines)
        if self.settings.embeddings:
            columns[f"{self.name}_image"] = images
            columns[f"{self.name}_text"] = texts
        return columns

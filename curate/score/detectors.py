"""Detectors as scorers: `faces` and `text_density`.

The picture is shrunk to the detector's canvas while it is prepared, so that a chunk of large photographs does not stay
in memory; the detectors would shrink it in the same way. Parameters that decide what is a face or a text region are the
published ones, and part of the table's identity where a recipe changes them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from curate.errors import ConfigError
from curate.score.decode import Picture, Unscorable
from curate.score.scorer import Device, ImageScorer, ModelSettings, ScorerSettings, Values
from curate.score.weight_files import sha256_of
from curate.score.weight_ref import WeightRef

Uint8 = npt.NDArray[np.uint8]
Detector = Callable[[Sequence[Uint8]], Mapping[str, Values]]
ROWS = 16  # pictures of one call; the detectors make smaller batches of their own


class DetectorScorer(ImageScorer[Uint8]):
    """A callable on pictures. Subclasses declare columns and open it."""

    batch_size = ROWS

    def __init__(self, name: str, settings: ScorerSettings) -> None:
        super().__init__(name, settings)
        self._detector: Detector | None = None
        self._side: int | None = None  # longer side of what `score` is given; None: as it is

    def open(self, device: Device) -> tuple[Detector, int | None]:
        """The loaded detector and the side to which pictures may be shrunk before it."""
        raise NotImplementedError

    def load(self, device: Device) -> None:
        """Open the detector."""
        self._detector, self._side = self.open(device)
        if self.how is not None and self.how.batch_size is not None:
            self.batch_size = self.how.batch_size

    def prepare(self, picture: Picture, text: str | None) -> Uint8 | Unscorable:
        """uint8 [h, w, 3], RGB."""
        if self._side is None:
            return picture.pixels
        from curate.score.canvas import fit  # noqa: PLC0415  # OpenCV: on workers only

        return fit(picture.pixels, self._side)

    def score(self, prepared: Sequence[Uint8]) -> Mapping[str, Values]:
        """The detector's columns."""
        if self._detector is None:
            raise RuntimeError(f"{self.name}: load() was not called")
        return self._detector(prepared)


def providers(device: Device) -> tuple[str, ...]:
    """ONNX Runtime's providers for a device."""
    return ("CUDAExecutionProvider", "CPUExecutionProvider") if device.name == "cuda" else ("CPUExecutionProvider",)


class FacesSettings(ModelSettings):
    """`weights`: a manifest name or a file; `least_score`: of a face, the detector's own default when absent."""

    detector: Literal["yunet", "scrfd"] = "yunet"
    weights: str | None = None
    least_score: Annotated[float, Field(gt=0, lt=1)] | None = None


class FacesScorer(DetectorScorer):
    """`num_faces`, `face_boxes`: relative [x0, y0, x1, y1], most certain first."""

    settings_type: ClassVar[type[ScorerSettings]] = FacesSettings

    def __init__(self, name: str, settings: FacesSettings) -> None:
        super().__init__(name, settings)
        self._settings = settings
        chosen = settings.weights or ("yunet-n-dynamic" if settings.detector == "yunet" else None)
        if chosen is None:
            raise ConfigError(f"score.{name}.weights: required; an SCRFD file in ONNX form (insightface's models)")
        self._weights = WeightRef(f"score.{name}.weights", chosen)

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """int32 and a list of boxes."""
        boxes = pa.list_(pa.list_(pa.float32()))
        return (pa.field("num_faces", pa.int32()), pa.field("face_boxes", boxes))

    def identity(self) -> Mapping[str, Any]:
        """The file by content, and the limit."""
        settings = self._settings
        return {"detector": settings.detector, "weights": self._weights.sha256, "least_score": settings.least_score}

    def check(self) -> None:
        """Raises WeightsError."""
        self._weights.path()

    def open(self, device: Device) -> tuple[Detector, int | None]:
        """YuNet or SCRFD."""
        from curate.score import faces  # noqa: PLC0415  # OpenCV and ONNX Runtime: on workers only

        file = self._weights.path()
        how: dict[str, Any] = {"threads": device.threads, "providers": providers(device)}
        least = self._settings.least_score
        if self._settings.detector == "scrfd":
            return faces.ScrfdFaces.from_file(file, score=least or faces.SCRFD_SCORE, **how), None
        found = faces.YuNetFaces.from_file(file, score=least or faces.YUNET_SCORE, **how)
        return found, faces.YUNET_SIDE if self._settings.weights is None else None  # a fixed-size file has its own


class TextDensitySettings(ModelSettings):
    """`weights`: another PP-OCR detector than the one inside the rapidocr wheel, a file in ONNX form."""

    weights: str | None = None


class TextDensityScorer(DetectorScorer):
    """`text_area`, `text_boxes`, `text_density`."""

    settings_type: ClassVar[type[ScorerSettings]] = TextDensitySettings

    def __init__(self, name: str, settings: TextDensitySettings) -> None:
        super().__init__(name, settings)
        self._weights = WeightRef(f"score.{name}.weights", settings.weights) if settings.weights else None

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """Share, count, density."""
        return (
            pa.field("text_area", pa.float32()),
            pa.field("text_boxes", pa.int32()),
            pa.field("text_density", pa.float32()),
        )

    def identity(self) -> Mapping[str, Any]:
        """The detector by content."""
        return {"weights": sha256_of(self._file()) if self._weights is None else self._weights.sha256}

    def check(self) -> None:
        """Raises WeightsError."""
        self._file()

    def open(self, device: Device) -> tuple[Detector, int | None]:
        """PP-OCR's detector."""
        from curate.score.text_density import PYRAMID, TextDetector  # noqa: PLC0415  # ONNX Runtime: on workers only

        detector = TextDetector.from_file(self._file(), threads=device.threads, providers=providers(device))
        return detector, PYRAMID[0][0]

    def _file(self) -> Path:
        if self._weights is not None:
            return self._weights.path()
        from curate.score.text_density import DETECTOR, wheel_model  # noqa: PLC0415  # its imports cost a plan 0.3 s

        return wheel_model(DETECTOR)

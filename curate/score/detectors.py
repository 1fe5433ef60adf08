"""Detectors as scorers: `faces`, `text_density`, `watermark`, `opennsfw2`, `gantman`.

The picture is shrunk to the detector's canvas while it is prepared, so that a chunk of large photographs does not stay
in memory; the detectors would shrink it in the same way. Parameters that decide what is a face or a text region are the
published ones, and part of the table's identity where a recipe changes them.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pyarrow as pa
from PIL import Image
from pydantic import Field

from curate.score.decode import Picture, Unscorable
from curate.score.scorer import Device, ImageScorer, ModelSettings, ScorerSettings, Values
from curate.score.weight_files import sha256_of
from curate.score.weight_ref import WeightRef

if TYPE_CHECKING:
    from curate.score.text_density import TextDetector, TextView

GANTMAN_LABELS = ("drawings", "hentai", "neutral", "porn", "sexy")  # the model's order
Shrink = Callable[[Picture], Any]
Detect = Callable[[Sequence[Any]], Mapping[str, Values]]
ROWS = 16  # pictures of one call; the detectors make smaller batches of their own
GPU_ROWS = 256
GPU_BATCH = 64  # pictures of one forward of a convolutional network


class DetectorScorer(ImageScorer[Any]):
    """A callable on pictures. Subclasses declare columns and open it."""

    batch_size = ROWS

    def __init__(self, name: str, settings: ScorerSettings) -> None:
        super().__init__(name, settings)
        self._shrink: Shrink | None = None
        self._detect: Detect | None = None

    @abstractmethod
    def open(self, device: Device) -> tuple[Shrink, Detect]:
        """What is done to each picture on a CPU thread, and the loaded detector of what that gives."""

    def load(self, device: Device) -> None:
        """Open the detector."""
        self._shrink, self._detect = self.open(device)
        self.batch_size = GPU_ROWS if device.name == "cuda" else ROWS
        if self.how is not None and self.how.batch_size is not None:
            self.batch_size = self.how.batch_size

    def prepare(self, picture: Picture, text: str | None) -> Any | Unscorable:
        """The picture, small."""
        if self._shrink is None:
            raise RuntimeError(f"{self.name}: load() was not called")
        return self._shrink(picture)

    def score(self, prepared: Sequence[Any]) -> Mapping[str, Values]:
        """The detector's columns."""
        if self._detect is None:
            raise RuntimeError(f"{self.name}: load() was not called")
        return self._detect(prepared)


class WeightsSettings(ModelSettings):
    """`weights`: a manifest name or a file."""

    weights: str | None = None


class OneFileScorer(DetectorScorer):
    """A detector in one file, `default` of the manifest unless an entry names another."""

    settings_type: ClassVar[type[ScorerSettings]] = WeightsSettings
    default: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]

    def __init__(self, name: str, settings: WeightsSettings) -> None:
        super().__init__(name, settings)
        self.weights = WeightRef(f"score.{name}.weights", settings.weights or self.default)

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """float32 columns."""
        return tuple(pa.field(column, pa.float32()) for column in self.columns)

    def identity(self) -> Mapping[str, Any]:
        """The file by content."""
        return {"weights": self.weights.sha256}

    def check(self) -> None:
        """Raises WeightsError."""
        self.weights.path()


class WatermarkScorer(OneFileScorer):
    """`watermark_score`: LAION's detector (RECIPES 12.4)."""

    default = "laion-watermark"
    columns = ("watermark_score",)

    def open(self, device: Device) -> tuple[Shrink, Detect]:
        """EfficientNet-B3 on 256 x 256."""
        from curate.score.watermark import WatermarkDetector, stretch  # noqa: PLC0415  # torch: on workers only

        return lambda picture: stretch(_squeezed(picture)), WatermarkDetector.from_file(
            self.weights.path(), device=device.name, batch_size=GPU_BATCH if device.name == "cuda" else ROWS
        ).score


class OpenNsfwScorer(OneFileScorer):
    """`nsfw_score_opennsfw2` (RECIPES 12.5)."""

    default = "opennsfw2"
    columns = ("nsfw_score_opennsfw2",)

    def open(self, device: Device) -> tuple[Shrink, Detect]:
        """Yahoo's network on opennsfw2's crop."""
        from curate.score.opennsfw2 import OpenNsfw, crop  # noqa: PLC0415  # torch: on workers only

        return lambda picture: crop(_squeezed(picture)), OpenNsfw.from_h5(
            self.weights.path(), device=device.name, batch_size=GPU_BATCH if device.name == "cuda" else ROWS
        ).score


class GantmanScorer(OneFileScorer):
    """`nsfw_score_gantman` and its five classes, by an ONNX conversion of nsfwjs's or nsfw_model's network."""

    version = 2  # stretched as nsfwjs does it
    default = "gantman-mobilenet-v2"
    columns = ("nsfw_score_gantman", *(f"nsfw_gantman_{label}" for label in GANTMAN_LABELS))

    def open(self, device: Device) -> tuple[Shrink, Detect]:
        """MobileNetV2 through ONNX Runtime."""
        from curate.score.classifiers import GantmanNsfw  # noqa: PLC0415  # ONNX Runtime: on workers only

        found = GantmanNsfw.from_file(self.weights.path(), threads=device.threads, providers=providers(device))
        return lambda picture: found.prepare(picture.pixels), found.score


def _squeezed(picture: Picture) -> Image.Image:
    """256 x 256, bilinear: with this both published preprocessings begin."""
    return picture.once("256 x 256", lambda: picture.rgb.resize((256, 256), Image.Resampling.BILINEAR))


def providers(device: Device) -> tuple[str, ...]:
    """ONNX Runtime's providers for a device: CUDA where this onnxruntime has it (`curate[gpu]`), else the CPU's."""
    from curate.score.onnx_session import CPU, CUDA, has_cuda  # noqa: PLC0415  # ONNX Runtime: on workers only

    return (CUDA, *CPU) if device.name == "cuda" and has_cuda() else CPU


class FacesSettings(WeightsSettings):
    """`least_score`: of a face, the detector's own default when absent."""

    detector: Literal["yunet", "scrfd"] = "yunet"
    least_score: Annotated[float, Field(gt=0, lt=1)] | None = None


class FacesScorer(DetectorScorer):
    """`num_faces`, `face_boxes`: relative [x0, y0, x1, y1], most certain first."""

    version = 3  # SCRFD's small pictures are enlarged
    settings_type: ClassVar[type[ScorerSettings]] = FacesSettings

    def __init__(self, name: str, settings: FacesSettings) -> None:
        super().__init__(name, settings)
        self._settings = settings
        chosen = settings.weights or {"yunet": "yunet-n-dynamic", "scrfd": "scrfd-10g"}[settings.detector]
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

    def open(self, device: Device) -> tuple[Shrink, Detect]:
        """YuNet or SCRFD."""
        from curate.score import faces  # noqa: PLC0415  # OpenCV and ONNX Runtime: on workers only

        file = self._weights.path()
        how: dict[str, Any] = {"threads": device.threads, "providers": providers(device)}
        least = self._settings.least_score
        if self._settings.detector == "scrfd":
            scrfd = faces.ScrfdFaces.from_file(file, score=least or faces.SCRFD_SCORE, **how)
            return lambda picture: scrfd.fitted(picture.pixels), scrfd
        batch = 32 if device.name == "cuda" else 8
        yunet = faces.YuNetFaces.from_file(file, score=least or faces.YUNET_SCORE, batch_size=batch, **how)
        return lambda picture: yunet.fitted(picture.pixels), yunet


class TextDensitySettings(WeightsSettings):
    """`recognize`: read the regions as well, which costs about as much again per dozen of them."""

    recognize: bool = False


class TextDensityScorer(DetectorScorer):
    """`text_area`, `text_boxes`, `text_density`, by the detector in the rapidocr wheel or another of PP-OCR (ONNX)."""

    version = 3  # small pictures are enlarged, regions count besides their length

    settings_type: ClassVar[type[ScorerSettings]] = TextDensitySettings

    def __init__(self, name: str, settings: TextDensitySettings) -> None:
        super().__init__(name, settings)
        self._weights = WeightRef(f"score.{name}.weights", settings.weights) if settings.weights else None
        self._reads = settings.recognize

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """Share, count, density; with recognition characters, density of what was read, and script."""
        kinds = {"text_area": pa.float32(), "text_boxes": pa.int32(), "text_density": pa.float32()}
        if self._reads:
            kinds |= {"text_chars": pa.int32(), "text_density_read": pa.float32(), "text_script": pa.string()}
        return tuple(pa.field(name, kind) for name, kind in kinds.items())

    def identity(self) -> Mapping[str, Any]:
        """Detector, and recogniser where it reads, by content."""
        detector = sha256_of(self._file()) if self._weights is None else self._weights.sha256
        return {"weights": detector, "recognizer": sha256_of(_recogniser()) if self._reads else None}

    def check(self) -> None:
        """Raises WeightsError."""
        self._file()
        if self._reads:
            _recogniser()

    def open(self, device: Device) -> tuple[Shrink, Detect]:
        """PP-OCR's detector, and its recogniser on the unshrunk picture."""
        from curate.score.text_density import columns  # noqa: PLC0415  # ONNX Runtime: on workers only

        file = self._file()
        detector = text_detector(file, device)
        if not self._reads:
            return (
                lambda picture: text_view(picture, file),
                lambda views: columns(detector.look(views), [view.pixels for view in views]),
            )
        from curate.score.text_recognition import TextReader  # noqa: PLC0415  # as above

        reader = TextReader.from_file(detector=detector, threads=device.threads, providers=providers(device))
        return (
            lambda picture: (picture.pixels, text_view(picture, file)),
            lambda pairs: reader.read_all([pixels for pixels, _ in pairs], detector.look([view for _, view in pairs])),
        )

    def _file(self) -> Path:
        return text_detector_file() if self._weights is None else self._weights.path()


def text_detector(file: Path, device: Device) -> "TextDetector":
    """PP-OCR's detector, opened."""
    from curate.score.text_density import TextDetector  # noqa: PLC0415  # ONNX Runtime: on workers only

    batch = 16 if device.name == "cuda" else 4  # canvases of 736 pixels: 6.5 MB each
    return TextDetector.from_file(file, batch_size=batch, threads=device.threads, providers=providers(device))


def text_view(picture: Picture, file: Path) -> "TextView":
    """The picture as this detector sees it: one object for all scorers, so that text is detected once."""
    from curate.score.text_density import TextView  # noqa: PLC0415  # as above

    return picture.once(("text", file), lambda: TextView(picture.pixels))


def text_detector_file() -> Path:
    """The detector in the rapidocr wheel. Raises WeightsError."""
    from curate.score.text_density import DETECTOR, wheel_model  # noqa: PLC0415  # its imports cost a plan 0.3 s

    return wheel_model(DETECTOR)


def _recogniser() -> Path:
    from curate.score.text_density import wheel_model  # noqa: PLC0415  # as above
    from curate.score.text_recognition import RECOGNISER  # noqa: PLC0415

    return wheel_model(RECOGNISER)

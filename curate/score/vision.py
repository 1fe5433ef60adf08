"""Networks that take one image each, as scorers: `hf_classifier`, `hf_embed`, `timm_classifier`, `timm_embed`,
`torchscript_embed` (SSCD), `onnx_classifier`, `onnx_embed`.

Declarations; the networks are in `vision_models.py`. A classifier writes `p_<label>`, an embedder the unit vectors
`<entry>_image` into `embeddings_<entry>`. Preprocessing is the model's own (its image processor, timm's data
configuration), or, for TorchScript and ONNX files, what the entry says. TorchScript files run their own graph, never
Python; no pickle is read.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from curate.errors import ConfigError
from curate.score.decode import Picture, Unscorable
from curate.score.hub_model import HubModel
from curate.score.scorer import GPU_QUEUE, Device, Float32, ImageScorer, ModelSettings, ScorerSettings, Values
from curate.score.weight_ref import WeightRef

if TYPE_CHECKING:
    from curate.score.vision_models import VisionModel

Width = Annotated[int, Field(gt=0)]
Triple = tuple[float, float, float]
Deviation = Annotated[float, Field(gt=0)]
Deviations = tuple[Deviation, Deviation, Deviation]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


class VisionScorer(ImageScorer[Float32]):
    """Columns or embeddings of one network. `open` loads it; `labels` is None for an embedder."""

    def __init__(self, name: str, settings: ModelSettings) -> None:
        super().__init__(name, settings)
        self._run_settings = settings
        self._model: VisionModel | None = None
        self._rows = 16
        self.labels: tuple[str, ...] | None = None
        self.width: int | None = None

    @abstractmethod
    def open(self, device: Device) -> "VisionModel":
        """The loaded network."""

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """`p_<label>`."""
        return tuple(pa.field(f"p_{label}", pa.float32()) for label in self.labels or ())

    @property
    def embeddings(self) -> tuple[pa.Field, ...]:
        """`<entry>_image`."""
        return () if self.width is None else (pa.field(f"{self.name}_image", pa.list_(pa.float16(), self.width)),)

    def load(self, device: Device) -> None:
        """Open the network and see that it gives what was declared."""
        self._model = self.open(device)
        self._rows = self._run_settings.batch_size or (128 if device.name == "cuda" else 16)
        self.batch_size = self._rows * (GPU_QUEUE if device.name == "cuda" else 1)

    def unload(self) -> None:
        """Drop the network."""
        self._model = None

    def prepare(self, picture: Picture, text: str | None) -> Float32 | Unscorable:
        """As the network takes it."""
        return self._loaded().prepare(picture)

    def score(self, prepared: Sequence[Float32]) -> Mapping[str, Values]:
        """One row of numbers an image."""
        rows = self._loaded().run(prepared, self._rows)
        expected = len(self.labels) if self.labels is not None else self.width
        if rows.shape[1] != expected:
            key = "labels" if self.labels is not None else "width"
            raise ConfigError(f"score.{self.name}.{key}: the model gives {rows.shape[1]} numbers, not {expected}")
        if self.labels is None:
            return {f"{self.name}_image": rows}
        return {f"p_{label}": rows[:, place] for place, label in enumerate(self.labels)}

    def _loaded(self) -> "VisionModel":
        if self._model is None:
            raise RuntimeError(f"{self.name}: load() was not called")
        return self._model


def column_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels as parts of column names: lower case, `_` for everything else."""
    return tuple(re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_") for label in labels)


class PreprocessSettings(ModelSettings):
    """`preprocess`: the library's own transform on CPU threads, or on the device."""

    preprocess: Literal["exact", "fast"] = "exact"


class HubSettings(PreprocessSettings):
    """`model`: a repository of the hub that is cached here, or a folder."""

    model: str


class HfClassifierScorer(VisionScorer):
    """Any `transformers` image classifier: softmax, or sigmoid where its configuration says multi-label."""

    settings_type: ClassVar[type[ScorerSettings]] = HubSettings

    def __init__(self, name: str, settings: HubSettings) -> None:
        super().__init__(name, settings)
        self.model, self._preprocess = HubModel(f"score.{name}.model", settings.model), settings.preprocess
        labels = self.model.config.get("id2label")
        if not labels:
            raise ConfigError(f"score.{name}.model: {settings.model} names no labels; it is no classifier")
        try:
            self.labels = column_names([labels[key] for key in sorted(labels, key=int)])
        except (ValueError, TypeError, AttributeError):
            raise ConfigError(
                f"score.{name}.model: id2label of {settings.model} is no map of numbers to names"
            ) from None

    def identity(self) -> Mapping[str, Any]:
        """The model, and how pixels become numbers."""
        return {**self.model.identity(), "preprocess": self._preprocess}

    def check(self) -> None:
        """Raises WeightsError."""
        self.model.check()

    def open(self, device: Device) -> "VisionModel":
        """Softmax or sigmoid of the logits."""
        from curate.score.vision_models import open_hf_classifier  # noqa: PLC0415  # torch: on workers only

        try:
            return open_hf_classifier(self.model.source, self._preprocess, device)
        except (ValueError, OSError) as error:
            raise self.model.unloadable(error) from error


class HfEmbedScorer(VisionScorer):
    """DINOv2, Web-SSL and other `transformers` vision towers: the class token after the last normalisation."""

    settings_type: ClassVar[type[ScorerSettings]] = HubSettings

    def __init__(self, name: str, settings: HubSettings) -> None:
        super().__init__(name, settings)
        self.model, self._preprocess = HubModel(f"score.{name}.model", settings.model), settings.preprocess
        width = self.model.config.get("hidden_size")
        if not isinstance(width, int) or width < 1:
            raise ConfigError(f"score.{name}.model: {settings.model} names no hidden_size; it is no plain vision tower")
        self.width = width

    def identity(self) -> Mapping[str, Any]:
        """The model, and how pixels become numbers."""
        return {**self.model.identity(), "preprocess": self._preprocess}

    def check(self) -> None:
        """Raises WeightsError."""
        self.model.check()

    def open(self, device: Device) -> "VisionModel":
        """Unit class tokens."""
        from curate.score.vision_models import open_hf_embedder  # noqa: PLC0415  # torch: on workers only

        try:
            return open_hf_embedder(self.model.source, self._preprocess, device)
        except (ValueError, OSError) as error:
            raise self.model.unloadable(error) from error


class TimmClassifierSettings(PreprocessSettings):
    """`model`: timm's name; `weights`: a file (safetensors, or .pth of tensors); `labels` in the model's order."""

    model: str
    weights: str
    labels: Annotated[list[str], Field(min_length=2)]


class TimmEmbedSettings(PreprocessSettings):
    """`model`: timm's name; `weights`: a file; `width`: length of its features."""

    model: str
    weights: str
    width: Width


class TimmScorer(VisionScorer):
    """Any timm model with weights in a file, through timm's own evaluation transform."""

    settings_type: ClassVar[type[ScorerSettings]] = TimmClassifierSettings

    def __init__(self, name: str, settings: TimmClassifierSettings | TimmEmbedSettings) -> None:
        super().__init__(name, settings)
        self._name, self._preprocess = settings.model, settings.preprocess
        self._weights = WeightRef(f"score.{name}.weights", settings.weights)
        if isinstance(settings, TimmClassifierSettings):
            self.labels = column_names(settings.labels)
        else:
            self.width = settings.width

    def identity(self) -> Mapping[str, Any]:
        """Architecture, and weights by content."""
        return {"model": self._name, "weights": self._weights.sha256, "preprocess": self._preprocess}

    def check(self) -> None:
        """Raises WeightsError."""
        self._weights.path()

    def open(self, device: Device) -> "VisionModel":
        """Softmax, or unit features."""
        from curate.score.vision_models import open_timm  # noqa: PLC0415  # torch: on workers only

        return open_timm(self._name, self._weights.path(), len(self.labels or ()), self._preprocess, device)


class TimmEmbedScorer(TimmScorer):
    """Unit features of a timm model."""

    settings_type: ClassVar[type[ScorerSettings]] = TimmEmbedSettings


class FileSettings(ModelSettings):
    """How an image becomes the input of a network in a file: bilinear to a square of `side` pixels (`squash`), or the
    shorter side and a centre crop (`crop`), 0..1, less mean, by deviation. A network of bytes takes the bytes."""

    weights: str
    side: Width = 224
    resize: Literal["squash", "crop"] = "squash"
    mean: Triple = IMAGENET_MEAN
    std: Deviations = IMAGENET_STD


class TorchScriptSettings(FileSettings, PreprocessSettings):
    """Defaults are SSCD's batched form, 320 x 320 (RECIPES 3)."""

    weights: str = "sscd-disc-mixup"
    width: Width = 512
    side: Width = 320


class OnnxEmbedSettings(FileSettings):
    """`output`: its name, where there are several."""

    width: Width
    output: str | None = None


class OnnxClassifierSettings(FileSettings):
    """`labels` in the order of the network's output, which is taken as it is: no softmax."""

    labels: Annotated[list[str], Field(min_length=1)]
    output: str | None = None


class FileScorer(VisionScorer):
    """A network in one file; a subclass says which kind."""

    def __init__(self, name: str, settings: FileSettings) -> None:
        super().__init__(name, settings)
        self.settings = settings
        self.weights = WeightRef(f"score.{name}.weights", settings.weights)
        if isinstance(settings, OnnxClassifierSettings):
            self.labels = column_names(settings.labels)
        elif isinstance(settings, TorchScriptSettings | OnnxEmbedSettings):
            self.width = settings.width

    def identity(self) -> Mapping[str, Any]:
        """The file by content, and what is done to an image."""
        run_only = {*ModelSettings.model_fields, "weights"}
        return {**self.settings.model_dump(mode="json", exclude=run_only), "weights": self.weights.sha256}

    def check(self) -> None:
        """Raises WeightsError."""
        self.weights.path()


class TorchScriptEmbedScorer(FileScorer):
    """Unit vectors of a TorchScript network."""

    settings_type: ClassVar[type[ScorerSettings]] = TorchScriptSettings

    def __init__(self, name: str, settings: TorchScriptSettings) -> None:
        super().__init__(name, settings)
        self._file_settings = settings

    def open(self, device: Device) -> "VisionModel":
        """torch.jit."""
        from curate.score.vision_models import open_torchscript  # noqa: PLC0415  # torch: on workers only

        return open_torchscript(self.weights.path(), self._file_settings, device)


class OnnxScorer(FileScorer):
    """A classifier in ONNX form."""

    settings_type: ClassVar[type[ScorerSettings]] = OnnxClassifierSettings

    def open(self, device: Device) -> "VisionModel":
        """ONNX Runtime."""
        from curate.score.vision_models import open_onnx  # noqa: PLC0415  # on workers only

        output = getattr(self.settings, "output", None)
        return open_onnx(self.weights.path(), self.settings, output, self.labels is None, device)


class OnnxEmbedScorer(OnnxScorer):
    """Unit vectors of a network in ONNX form."""

    settings_type: ClassVar[type[ScorerSettings]] = OnnxEmbedSettings

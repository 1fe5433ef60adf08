"""`clip_text_masked`: T-MARS (Maini et al. 2023, 2307.03132): found text is painted over, then CLIP is asked again.

`clip_similarity_text_masked` stays high where the picture itself shows what the caption says, and falls where only its
text did. Each region takes the mean colour of the pixels around it, as T-MARS does (the repository holds the detection
alone, so width of the surroundings and colour mean are ours: a band a quarter as wide as the region is high).
The detector is that of `text_density`; where both are asked for, each picture is looked at once.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from curate.score.clip import ClipScorer, ClipSettings, Pair
from curate.score.decode import Picture, Unscorable
from curate.score.detectors import text_detector, text_detector_file, text_view
from curate.score.scorer import Device, ImageScorer, ScorerSettings, Values
from curate.score.weight_files import sha256_of

if TYPE_CHECKING:
    from curate.score.text_density import TextDetector, TextRegions, TextView

Uint8 = npt.NDArray[np.uint8]
BAND = 0.25  # of the region's shorter side
LEAST_BAND = 2  # pixels
GPU_PAINTERS = 8  # threads that paint and resize while the GPU waits


class TextMaskedSettings(ClipSettings):
    """As `clip`, which should score the unmasked picture with the same model."""

    embeddings: bool = False
    column: str | None = "clip_similarity_text_masked"


@dataclass(frozen=True)
class Unmasked:
    """One prepared sample: the whole picture, the detector's view of it, and its text."""

    pixels: Uint8
    view: "TextView"
    text: str | None


class TextMaskedScorer(ImageScorer[Unmasked]):
    """CLIP on pictures whose text was painted over."""

    version = 3  # regions as text_density finds them since its version 3
    settings_type: ClassVar[type[ScorerSettings]] = TextMaskedSettings
    reads_text: ClassVar[bool] = True
    follows: ClassVar[bool] = True

    def __init__(self, name: str, settings: TextMaskedSettings) -> None:
        super().__init__(name, settings)
        self._clip = ClipScorer(name, settings)
        self._detector: TextDetector | None = None
        self._painters = 1

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """The similarity alone."""
        return self._clip.fields[:1]

    def identity(self) -> Mapping[str, Any]:
        """The model and the detector."""
        return {**self._clip.identity(), "detector": sha256_of(text_detector_file()), "band": BAND}

    def check(self) -> None:
        """Raises WeightsError for either."""
        self._clip.check()
        text_detector_file()

    def load(self, device: Device) -> None:
        """Load both."""
        self._clip.load(device)
        self._detector = text_detector(text_detector_file(), device)
        self._painters = GPU_PAINTERS if device.name == "cuda" else 1
        self.batch_size = self._clip.batch_size

    def begin(self) -> None:
        """Forget the last shard's texts."""
        self._clip.begin()

    def unload(self) -> None:
        """Drop both."""
        self._clip.unload()
        self._detector = None

    def prepare(self, picture: Picture, text: str | None) -> Unmasked | Unscorable:
        """Nothing but the detector's view, which `text_density` shares."""
        return Unmasked(picture.pixels, text_view(picture, text_detector_file()), text)

    def score(self, prepared: Sequence[Unmasked]) -> Mapping[str, Values]:
        """Detect what nobody has looked at yet, paint over, and score as CLIP does."""
        if self._detector is None:
            raise RuntimeError(f"{self.name}: load() was not called")
        found = self._detector.look([sample.view for sample in prepared])
        with ThreadPoolExecutor(self._painters, "curate-paint") as pool:
            pairs = list(pool.map(self._painted, prepared, found))
        columns = self._clip.score(pairs)
        return {field.name: columns[field.name] for field in self.fields}

    def _painted(self, sample: Unmasked, regions: "TextRegions") -> Pair:
        painted = Picture(Image.fromarray(painted_over(sample.pixels, regions)), 0)
        return self._clip.prepare(painted, sample.text)


def painted_over(pixels: Uint8, regions: "TextRegions") -> Uint8:
    """A copy of uint8 [h, w, 3] in which each region has the mean colour of the band around it, less other text.

    A region whose whole band is text, or lies outside, takes the mean of the picture without text.
    """
    import cv2  # noqa: PLC0415  # on workers only

    height, width = pixels.shape[:2]
    text = regions.mask(height, width)
    found = pixels.copy()
    free = pixels[text == 0]
    elsewhere = free.mean(axis=0) if len(free) else np.array([127.0, 127.0, 127.0])
    for quad in regions.quads * np.array([width, height], dtype=np.float32):
        sides = np.linalg.norm(np.diff(np.vstack([quad, quad[:1]]), axis=0), axis=1)
        band = max(LEAST_BAND, round(float(sides.min()) * BAND))
        x0, y0 = np.maximum(np.floor(quad.min(axis=0)).astype(int) - band, 0)
        x1, y1 = np.minimum(np.ceil(quad.max(axis=0)).astype(int) + band + 1, [width, height])
        if x0 >= x1 or y0 >= y1:
            continue
        inside = np.zeros((y1 - y0, x1 - x0), dtype=np.uint8)
        cv2.fillConvexPoly(inside, np.rint(quad - [x0, y0] - 0.5).astype(np.int32), (1.0,))
        grown = cv2.dilate(inside, np.ones((2 * band + 1, 2 * band + 1), dtype=np.uint8))
        ring = pixels[y0:y1, x0:x1][(grown == 1) & (text[y0:y1, x0:x1] == 0)]
        colour = ring.mean(axis=0) if len(ring) else elsewhere
        found[y0:y1, x0:x1][inside == 1] = np.rint(colour).astype(np.uint8)
    return found

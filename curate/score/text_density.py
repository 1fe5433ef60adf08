"""Text in pictures: `text_area`, `text_boxes`, `text_density`, by PP-OCR's detector run directly.

Area alone does not tell a document from a sign, and one false region can cover a whole photograph. So the detector
looks at a pyramid of three canvases and believes each one only for letters of the height that it reads well:
a coffee cup is a "text region" at one scale, and vanishes at the scale that is meant for letters of its size.
The density counts regions and the letter-heights of line in them, so that a page of small lines, or a chart of many
labels, weighs more than a big sign.
Method: DB post-processing (Liao et al. 2020) as PaddleOCR does it. Recognition is in `text_recognition`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from curate.errors import WeightsError
from curate.score.canvas import Float32, Uint8, blob, fit
from curate.score.onnx_session import CPU, open_session

DETECTOR = "PP-OCRv6_det_small.onnx"

# (canvas side in pixels, least and greatest region height that is believed, as shares of the longer side).
# On ../shared/realdata, text against no text: 736 alone 0.978 AUC, with 224 and 96 0.990; the second and third
# canvas cost 11 % of the first. Neighbouring choices (192-320, 64-128, limits 0.15-0.6) all give 0.985-0.991.
PYRAMID = ((736, 0.0, 0.2), (224, 0.2, 0.5), (96, 0.5, float("inf")))

# Smaller pictures are enlarged to the finest canvas, by at most this, which costs the same: letters of 5 pixels are
# found at 10. The coarser canvases, meant for large letters, take them as they are. On ../shared/realdata text against
# no text 0.994 AUC and not 0.991, at half size 0.985 and not 0.964; three times the size gains nothing more.
MOST_ENLARGED = 2.0

TEXT_PIXEL = 0.3  # PaddleOCR's det_db_thresh
TEXT_REGION = 0.4  # least mean probability inside a region; PaddleOCR has 0.5-0.6, which loses faint text
UNCLIP = 1.6  # DB shrinks regions when training: grow by area * 1.6 / perimeter
LEAST_SIDE = 2.0  # pixels, before growing
MOST_REGIONS = 1000  # contours looked at per canvas, PaddleOCR's max_candidates: bounds noise pictures
GIANT = 0.5  # from this height on half a region's length counts, in the density alone: any centred object looks so
LONGEST_LINE = 20.0  # letter-heights that one region may count: one rule or fence is not a page
# Letter-heights that a region counts besides its length: labels of a chart are short and many, a meme's lines long and
# few. Heavy against the rest, mean of four sizes and qualities: 0.995 AUC and not 0.991. Chosen on half of the images
# (2 to 6 lie within 0.001); on the other half nothing is lost.
REGION = 4.0
HALF_PAGE = 100.0  # letter-heights at which the density is 0.5; signs and memes end here, documents begin


@dataclass(frozen=True, slots=True)
class TextRegions:
    """Text regions of one picture, from the finest canvas to the coarsest.

    `quads` float32 [k, 4, 2]: corners (x, y) as shares of width and height, in order along the box;
    `scores` float32 [k]: mean probability in 0..1; `line`: letter-heights of line (length over height of each
    region, at most LONGEST_LINE, and REGION, times its score; giants, which have no quad, half their length alone).
    """

    quads: Float32
    scores: Float32
    line: float

    def mask(self, height: int, width: int) -> Uint8:
        """uint8 [height, width], 1 inside text: what T-MARS paints over."""
        filled = np.zeros((height, width), dtype=np.uint8)
        corners = np.rint(self.quads * np.array([width, height], dtype=np.float32) - 0.5).astype(np.int32)
        for quad in corners:
            cv2.fillConvexPoly(filled, quad, 1)
        return filled

    def density(self) -> float:
        """Letter-heights of line L, weighed by certainty, as L / (L + 100): 0 without text, never quite 1."""
        return self.line / (self.line + HALF_PAGE)


class TextView:
    """A picture as the detector sees it, uint8 [h, w, 3], and its regions once some scorer has asked.

    `pixels`: on the finest canvas; `coarse`: for the others, never enlarged (mostly the same array).
    """

    __slots__ = ("coarse", "pixels", "regions")

    def __init__(self, picture: Uint8) -> None:
        self.coarse = fit(picture, PYRAMID[0][0], smooth=True)
        self.pixels = _enlarged(self.coarse)
        self.regions: TextRegions | None = None


def wheel_model(name: str) -> Path:
    """Path of a model that the installed rapidocr wheel carries; rapidocr itself is not imported.

    Raises WeightsError when rapidocr, or this model in it, is missing.
    """
    spec = find_spec("rapidocr")
    folder = Path(next(iter(spec.submodule_search_locations or [""]))) / "models" if spec else None
    if folder is None or not (folder / name).is_file():
        raise WeightsError(f"the installed rapidocr carries no {name}; pip install 'rapidocr>=3.10', or name a file")
    return folder / name


class TextDetector:
    """PP-OCR's text detector over uint8 RGB pictures of any size; one session, fixed square canvases, batched."""

    def __init__(self, session: ort.InferenceSession, *, batch_size: int) -> None:
        self._session = session
        self._batch_size = batch_size
        self._input = session.get_inputs()[0].name

    @classmethod
    def from_file(
        cls,
        path: Path | str | None = None,
        *,
        batch_size: int = 4,
        threads: int = 1,
        providers: Sequence[str] = CPU,
    ) -> "TextDetector":
        """Open a PP-OCR detection model (default: the one inside the rapidocr wheel).

        Raises WeightsError when the file is missing or is not an ONNX model.
        """
        file = wheel_model(DETECTOR) if path is None else path
        return cls(open_session(file, threads=threads, providers=providers), batch_size=batch_size)

    def __call__(self, images: Sequence[Uint8]) -> dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int32]]:
        """Columns of uint8 RGB pictures [h, w, 3]: `text_area` (share of pixels inside text, float32),
        `text_boxes` (regions, int32), `text_density` (float32 in [0, 1))."""
        return columns(self.detect(images), images)

    def look(self, views: Sequence[TextView]) -> list[TextRegions]:
        """Text regions of each view; those that have been looked at are not looked at again."""
        new = [view for view in views if view.regions is None]
        for start in range(0, len(new), self._batch_size):
            batch = new[start : start + self._batch_size]
            finest = [view.pixels for view in batch]
            levels = [list(self._level(finest, *PYRAMID[0]))]
            levels += [list(self._level([view.coarse for view in batch], *level)) for level in PYRAMID[1:]]
            for view, parts in zip(batch, zip(*levels, strict=True), strict=True):
                view.regions = _merged(parts)
        return [view.regions for view in views if view.regions is not None]

    def detect(self, images: Sequence[Uint8]) -> list[TextRegions]:
        """Text regions of each picture."""
        return self.look([TextView(image) for image in images])

    def _level(self, pictures: Sequence[Uint8], side: int, least: float, greatest: float) -> Iterator[TextRegions]:
        """Regions that one canvas of the pyramid is believed for."""
        fitted = [fit(picture, side, smooth=True) for picture in pictures]
        pixels = blob(fitted, side, fill=127, mean=127.5, scale=1 / 127.5, bgr=True)
        probability = self._session.run(None, {self._input: pixels})[0]
        for row, picture in enumerate(fitted):
            height, width = picture.shape[:2]
            yield _regions(probability[row, 0, :height, :width], least, greatest)


def columns(
    found: Sequence[TextRegions], images: Sequence[Uint8]
) -> dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int32]]:
    """`text_area`, `text_boxes`, `text_density` of regions found in these pictures."""
    area = [_area(regions, image) for regions, image in zip(found, images, strict=True)]
    return {
        "text_area": np.array(area, dtype=np.float32),
        "text_boxes": np.array([len(regions.quads) for regions in found], dtype=np.int32),
        "text_density": np.array([regions.density() for regions in found], dtype=np.float32),
    }


def _enlarged(rgb: Uint8) -> Uint8:
    """The picture grown to the finest canvas, at most MOST_ENLARGED times; larger ones as they are."""
    height, width = rgb.shape[:2]
    scale = min(PYRAMID[0][0] / max(height, width), MOST_ENLARGED)
    if scale <= 1.0:
        return rgb
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def _area(regions: TextRegions, image: Uint8) -> float:
    """Share of the picture inside text, overlaps once; measured on a grid as large as the finest canvas."""
    if not len(regions.quads):
        return 0.0
    scale = PYRAMID[0][0] / max(image.shape[:2])
    return float(regions.mask(max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale))).mean())


def _merged(parts: Sequence[TextRegions]) -> TextRegions:
    return TextRegions(
        np.concatenate([part.quads for part in parts]),
        np.concatenate([part.scores for part in parts]),
        sum(part.line for part in parts),
    )


def _regions(probability: Float32, least: float, greatest: float) -> TextRegions:
    """DB post-processing of one probability map [h, w]; heights are shares of its longer side."""
    height, width = probability.shape
    mask = cv2.dilate((probability > TEXT_PIXEL).astype(np.uint8), np.ones((2, 2), dtype=np.uint8))
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    quads, scores, line = [], [], 0.0
    for contour in contours[:MOST_REGIONS]:
        centre, (side_a, side_b), angle = cv2.minAreaRect(contour)
        if min(side_a, side_b) < LEAST_SIDE:
            continue
        grow = side_a * side_b * UNCLIP / (side_a + side_b)  # twice area * UNCLIP / perimeter: both ends
        short, long = min(side_a, side_b) + grow, max(side_a, side_b) + grow
        share = short / max(height, width)
        if not least <= share < greatest:
            continue
        score = _mean_inside(probability, cv2.boxPoints((centre, (side_a, side_b), angle)).astype(np.float32))
        if score < TEXT_REGION:
            continue
        length = min(long / short, LONGEST_LINE)
        line += (length + REGION if share < GIANT else length / 2) * score
        if share < GIANT:
            quads.append(cv2.boxPoints((centre, (side_a + grow, side_b + grow), angle)))
            scores.append(score)
    corners = (np.array(quads, dtype=np.float32).reshape(-1, 4, 2) + 0.5) / np.array([width, height], dtype=np.float32)
    return TextRegions(np.clip(corners, 0.0, 1.0), np.array(scores, dtype=np.float32), line)


def _mean_inside(probability: Float32, quad: Float32) -> float:
    """Mean probability inside a quadrilateral, in map pixels."""
    height, width = probability.shape
    x0, y0 = np.maximum(np.floor(quad.min(axis=0)), 0).astype(np.int64)
    x1 = min(int(np.ceil(quad[:, 0].max())), width - 1)
    y1 = min(int(np.ceil(quad[:, 1].max())), height - 1)
    inside = np.zeros((max(0, y1 - y0 + 1), max(0, x1 - x0 + 1)), dtype=np.uint8)
    if not inside.size:
        return 0.0
    cv2.fillPoly(inside, [(quad - np.array([x0, y0], dtype=np.float32)).astype(np.int32)], (1.0,))
    return float(cv2.mean(probability[y0 : y1 + 1, x0 : x1 + 1], inside)[0])

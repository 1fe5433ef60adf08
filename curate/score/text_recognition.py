"""Optional reading of the found text, by PP-OCR's recogniser from the rapidocr wheel.

Gives `text_chars`, `text_script` and `text_density_read`, and costs twice what detection does on ../shared/realdata
(12 regions a picture). Regions are cut out upright, brought to a height of 48 pixels, and padded to one of a few
widths, so that a line's reading does not depend on the lines that happen to share its batch. The density with reading
is the mean of two estimates of how much is written: detection's letter-heights, and characters of one letter-height
each. Characters alone are blind to scripts that the model does not read (Hebrew, Devanagari) and to pages lying on
their side. Lines read with less certainty than 0.5 (rapidocr's text_score) do not count, nor does white space.
Keeps no text: counts and a script only.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from curate.errors import WeightsError
from curate.score.canvas import Float32, Uint8, as_rgb
from curate.score.onnx_session import CPU, open_session
from curate.score.text_density import HALF_PAGE, TextDetector, TextRegions, columns, wheel_model

RECOGNISER = "PP-OCRv6_rec_small.onnx"
HEIGHT = 48
WIDTHS = (160, 320, 640, 1280)  # of padded lines; longer ones are squeezed into the last
LEAST_CERTAINTY = 0.5
TALL = 1.5  # a region taller than this many widths is set vertically, and is turned (as rapidocr does)

# First word of a character's Unicode name -> ISO 15924 code.
SCRIPTS = {
    "LATIN": "Latn",
    "CJK": "Hani",
    "HIRAGANA": "Jpan",
    "KATAKANA": "Jpan",
    "HANGUL": "Kore",
    "CYRILLIC": "Cyrl",
    "GREEK": "Grek",
    "ARABIC": "Arab",
    "HEBREW": "Hebr",
    "DEVANAGARI": "Deva",
    "THAI": "Thai",
}


class TextReader:
    """Detection and recognition over uint8 RGB pictures of any size."""

    def __init__(
        self, detector: TextDetector, session: ort.InferenceSession, alphabet: Sequence[str], *, batch_size: int
    ) -> None:
        self._detector = detector
        self._session = session
        self._alphabet = ["", *alphabet, " "]  # CTC's blank first, then the file's characters, then the space
        self._batch_size = batch_size
        self._input = session.get_inputs()[0].name

    @classmethod
    def from_file(
        cls,
        path: Path | str | None = None,
        *,
        detector: TextDetector | None = None,
        batch_size: int = 8,
        threads: int = 1,
        providers: Sequence[str] = CPU,
    ) -> "TextReader":
        """Open a PP-OCR recognition model that carries its alphabet (default: the one inside the rapidocr wheel).

        Raises WeightsError when a file is missing, is not an ONNX model, or has another number of characters.
        """
        file = wheel_model(RECOGNISER) if path is None else path
        session = open_session(file, threads=threads, providers=providers)
        alphabet = session.get_modelmeta().custom_metadata_map.get("character", "").splitlines()
        classes = session.get_outputs()[0].shape[-1]
        if not alphabet or classes != len(alphabet) + 2:
            raise WeightsError(f"{file} is no PP-OCR recogniser: {classes} classes for {len(alphabet)} characters")
        found = detector or TextDetector.from_file(threads=threads, providers=providers)
        return cls(found, session, alphabet, batch_size=batch_size)

    def __call__(self, images: Sequence[Uint8]) -> dict[str, npt.NDArray[np.generic] | list[str | None]]:
        """`text_area`, `text_boxes`, `text_density`, and what was read of uint8 RGB pictures [h, w, 3].

        `text_chars`: characters read, int32. `text_density_read`: float32 in [0, 1), see the module.
        `text_script`: ISO 15924 code of the most frequent script among the letters, None where no letter was read.
        """
        return self.read_all(images, self._detector.detect(images))

    def read_all(
        self, images: Sequence[Uint8], regions: Sequence[TextRegions]
    ) -> dict[str, npt.NDArray[np.generic] | list[str | None]]:
        """The same columns of pictures whose regions are known."""
        read = [self.read(image, found) for image, found in zip(images, regions, strict=True)]
        characters = [len("".join("".join(lines).split())) for lines in read]
        written = [(found.line + count) / 2 for found, count in zip(regions, characters, strict=True)]
        return {
            **columns(regions, images),
            "text_chars": np.array(characters, dtype=np.int32),
            "text_density_read": np.array([line / (line + HALF_PAGE) for line in written], dtype=np.float32),
            "text_script": [script_of("".join(lines)) for lines in read],
        }

    def read(self, image: Uint8, regions: TextRegions) -> list[str]:
        """The lines of one picture that were read with enough certainty, in the regions' order."""
        crops = [_upright(as_rgb(image), quad) for quad in regions.quads]
        lines = [""] * len(crops)
        for width in WIDTHS:
            places = [i for i, crop in enumerate(crops) if _bucket(crop) == width]
            for start in range(0, len(places), self._batch_size):
                batch = places[start : start + self._batch_size]
                for place, line in zip(batch, self._decode([crops[i] for i in batch], width), strict=True):
                    lines[place] = line
        return lines

    def _decode(self, crops: Sequence[Uint8], width: int) -> Iterator[str]:
        """Greedy CTC: best class of each step, repeats and blanks dropped; uncertain lines are empty."""
        canvas = np.zeros((len(crops), 3, HEIGHT, width), dtype=np.float32)
        for row, crop in zip(canvas, crops, strict=True):
            wide = min(width, max(1, int(np.ceil(HEIGHT * crop.shape[1] / crop.shape[0]))))
            line = np.asarray(cv2.resize(crop, (wide, HEIGHT)), dtype=np.float32)[:, :, ::-1]  # BGR
            row[:, :, :wide] = (line / 127.5 - 1.0).transpose(2, 0, 1)
        steps: Float32 = self._session.run(None, {self._input: canvas})[0]
        best, certainty = steps.argmax(axis=2), steps.max(axis=2)
        for classes, sure in zip(best, certainty, strict=True):
            kept = (classes != 0) & np.append(True, classes[1:] != classes[:-1])
            confident = bool(kept.any()) and float(sure[kept].mean()) >= LEAST_CERTAINTY
            yield "".join(self._alphabet[i] for i in classes[kept]) if confident else ""


def script_of(text: str) -> str | None:
    """ISO 15924 code of the most frequent script among the letters of a text; ties by code, None without letters."""
    counts: Counter[str] = Counter()
    for character in text:
        if character.isalpha():
            counts[SCRIPTS.get(unicodedata.name(character, "").split(" ")[0].split("-")[0], "Zyyy")] += 1
    if counts["Jpan"]:  # kana is only written in Japanese: its Chinese characters are Japanese too
        counts["Jpan"] += counts.pop("Hani", 0)
    return min(counts, key=lambda code: (-counts[code], code)) if counts.total() else None


def _bucket(crop: Uint8) -> int:
    wanted = HEIGHT * crop.shape[1] / crop.shape[0]
    return next((width for width in WIDTHS if wanted <= width), WIDTHS[-1])


def _upright(image: Uint8, quad: Float32) -> Uint8:
    """The region cut out of the picture and laid level: uint8 [h, w, 3], at least 1 x 1."""
    corners = quad * np.array([image.shape[1], image.shape[0]], dtype=np.float32)
    corners = corners[np.lexsort((corners[:, 1], corners[:, 0]))]  # two leftmost first
    left, right = corners[:2], corners[2:]
    top_left, bottom_left = left[np.argsort(left[:, 1], kind="stable")]
    top_right, bottom_right = right[np.argsort(right[:, 1], kind="stable")]
    wide = max(1, round(float(np.linalg.norm(top_right - top_left))))
    high = max(1, round(float(np.linalg.norm(bottom_left - top_left))))
    source = np.stack([top_left, top_right, bottom_right, bottom_left]).astype(np.float32)
    target = np.array([[0, 0], [wide, 0], [wide, high], [0, high]], dtype=np.float32)
    matrix = cv2.getPerspectiveTransform(source, target)
    level = cv2.warpPerspective(image, matrix, (wide, high), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(np.rot90(level) if high > wide * TALL else level, dtype=np.uint8)

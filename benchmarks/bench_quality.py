"""Quality of the detectors on real, labelled images: text, faces, blurred, blank.

    python benchmarks/bench_quality.py [--shared DIR] [--recognition] [--images N] [--stored 512] [--changed half]

Prints a Markdown table with each figure, the bar it must pass, its 95 % bootstrap interval over the images, and the
two halves of a random split: a figure that rests on a few files shows there. Nothing is fitted here. Blurred and blank
pictures are made from the same images (Gaussian blur; flat pictures with JPEG noise), since few are labelled.
"""

import argparse
import csv
import io
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from curate.score.faces import YuNetFaces
from curate.score.image_facts import image_facts
from curate.score.text_density import TextDetector
from curate.score.text_recognition import TextReader

Float64 = npt.NDArray[np.float64]
Uint8 = npt.NDArray[np.uint8]
RESAMPLES = 1000


@dataclass(frozen=True)
class Figure:
    """`measure(values, labels)` over one row an image; `bar` is what it must reach, None where there is none."""

    name: str
    values: Float64
    labels: npt.NDArray[np.int64]
    measure: Callable[[Float64, npt.NDArray[np.int64]], float]
    bar: float | None = None


def auc(values: Float64, labels: npt.NDArray[np.int64]) -> float:
    """ROC-AUC of values for labels 1 against 0; ties count half."""
    positive, negative = values[labels == 1][:, None], values[labels == 0][None]
    if not positive.size or not negative.size:
        return float("nan")
    return float(((positive > negative) + 0.5 * (positive == negative)).mean())


def exact(values: Float64, labels: npt.NDArray[np.int64]) -> float:
    """Share of counts that are right."""
    return float((values == labels).mean())


def within_one(values: Float64, labels: npt.NDArray[np.int64]) -> float:
    """Share of counts that are off by at most one."""
    return float((np.abs(values - labels) <= 1).mean())


def absolute_error(values: Float64, labels: npt.NDArray[np.int64]) -> float:
    """Mean absolute error of counts."""
    return float(np.abs(values - labels).mean())


def load(path: Path) -> Uint8:
    """First frame as RGB, transparency on white."""
    with Image.open(path) as image:
        if image.mode not in ("RGBA", "LA", "P"):
            return np.asarray(image.convert("RGB"), dtype=np.uint8)
        layer = image.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
        return np.asarray(flat.convert("RGB"), dtype=np.uint8)


def load_stored(path: Path, side: int | None, changed: str | None) -> Uint8:
    """The picture, changed, shrunk to a longer side and through JPEG (90) as a pool holds it; None leaves that out."""
    image = load(path) if changed is None else CHANGES[changed](load(path))
    scale = (side or max(image.shape[:2])) / max(image.shape[:2])
    if scale >= 1:
        return image
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return through_jpeg(np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8), 90)


def rows_of(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def spread(figure: Figure, rng: np.random.Generator) -> tuple[float, float]:
    """95 % bootstrap interval over images, resampled within each label class of an AUC."""
    count = len(figure.values)
    groups = (
        [np.flatnonzero(figure.labels == label) for label in (0, 1)] if figure.measure is auc else [np.arange(count)]
    )
    found = []
    for _ in range(RESAMPLES):
        pick = np.concatenate([rng.choice(group, len(group)) for group in groups])
        found.append(figure.measure(figure.values[pick], figure.labels[pick]))
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)


def halves(figure: Figure, rng: np.random.Generator) -> tuple[float, float]:
    """The figure on two random halves of the images."""
    order = rng.permutation(len(figure.values))
    parts = order[::2], order[1::2]
    first, second = (figure.measure(figure.values[part], figure.labels[part]) for part in parts)
    return first, second


def text_figures(
    root: Path, *, recognition: bool, limit: int | None, stored: int | None, changed: str | None
) -> list[Figure]:
    """Text against no text, and heavy against the rest, for each column that ranks."""
    rows = [row for row in rows_of(root / "manifest.csv") if row["folder"].startswith("text_")][:limit]
    detector = TextDetector.from_file()
    score = TextReader.from_file(detector=detector) if recognition else detector
    found: dict[str, list[float]] = {}
    start, cpu = time.perf_counter(), time.process_time()
    for row in rows:
        columns = score([load_stored(root / row["path"], stored, changed)])
        for column in ("text_density", "text_boxes", "text_area", "text_density_read", "text_chars"):
            if column in columns:
                found.setdefault(column, []).append(float(np.asarray(columns[column])[0]))
    report_time("text", len(rows), start, cpu)
    heavy = np.array([row["folder"] == "text_heavy" for row in rows], dtype=np.int64)
    some = np.array([row["folder"] != "text_none" for row in rows], dtype=np.int64)
    bars = {"text_density": (0.98, 0.99), "text_density_read": (0.99, 0.99)}
    figures = []
    for column, values in found.items():
        text_bar, heavy_bar = bars.get(column, (None, None))
        figures.append(Figure(f"{column}: text / no text, AUC", np.array(values), some, auc, text_bar))
        figures.append(Figure(f"{column}: heavy / the rest, AUC", np.array(values), heavy, auc, heavy_bar))
    return figures


def face_figures(root: Path, yunet: Path, stored: int | None, changed: str | None) -> list[Figure]:
    """Counted faces."""
    rows = rows_of(root / "faces.csv")
    start, cpu = time.perf_counter(), time.process_time()
    pictures = [load_stored(root / row["path"], stored, changed) for row in rows]
    counts = YuNetFaces.from_file(yunet)(pictures)["num_faces"]
    report_time("faces", len(rows), start, cpu)
    values, labels = np.array(counts, dtype=np.float64), np.array([int(row["num_faces"]) for row in rows])
    return [
        Figure("num_faces: exact", values, labels, exact, 0.90),
        Figure("num_faces: within one", values, labels, within_one, 0.96),
        Figure("num_faces: mean absolute error", values, labels, absolute_error),
    ]


def through_jpeg(image: Uint8, quality: int = 85) -> Uint8:
    """The picture as a JPEG gives it back."""
    packed = io.BytesIO()
    Image.fromarray(image).save(packed, format="JPEG", quality=quality)
    return np.asarray(Image.open(packed), dtype=np.uint8)


def _half(image: Uint8) -> Uint8:
    size = (max(1, image.shape[1] // 2), max(1, image.shape[0] // 2))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


CHANGES: dict[str, Callable[[Uint8], Uint8]] = {
    "half": _half,
    "mirrored": lambda image: np.ascontiguousarray(image[:, ::-1]),
    "q50": lambda image: through_jpeg(image, 50),
    "turned": lambda image: np.ascontiguousarray(np.rot90(image)),
}


def pixel_figures(root: Path) -> list[Figure]:
    """Sharp against blurred (Gaussian, sigma 3 of 512 pixels), and real against blank pictures, by one column each."""
    rng = np.random.default_rng(0)
    rows = [row for row in rows_of(root / "manifest.csv") if row["folder"] in ("text_none", "faces")]
    real = [load(root / row["path"]) for row in rows]
    small = [cv2.resize(image, (512, max(1, round(512 * image.shape[0] / image.shape[1])))) for image in real]
    blurred = [np.asarray(cv2.GaussianBlur(image, (0, 0), 3.0), dtype=np.uint8) for image in small]
    blank = [_blank(rng) for _ in real]
    start, cpu = time.perf_counter(), time.process_time()
    facts = image_facts(real)
    report_time("image facts", len(real), start, cpu)
    of_blurred, of_blank = image_facts([through_jpeg(image) for image in blurred]), image_facts(blank)
    labels = np.repeat([1, 0], len(real))

    def both(column: str, other: dict[str, npt.NDArray[np.float32]], sign: int) -> Float64:
        return sign * np.concatenate([facts[column], other[column]]).astype(np.float64)

    return [
        Figure("sharpness: real / blurred, AUC", both("sharpness", of_blurred, 1), labels, auc),
        Figure("contrast: real / blank, AUC", both("contrast", of_blank, 1), labels, auc),
        Figure("entropy: real / blank, AUC", both("entropy", of_blank, 1), labels, auc),
        Figure("flat_share: blank / real, AUC", both("flat_share", of_blank, -1), labels, auc),
    ]


def _blank(rng: np.random.Generator) -> Uint8:
    """One colour with faint noise, through JPEG."""
    colour = rng.integers(0, 256, 3)
    noise = rng.normal(0, rng.uniform(0, 2), (200, 300, 1))
    return through_jpeg(np.clip(colour + noise, 0, 255).astype(np.uint8))


def report_time(name: str, count: int, start: float, cpu: float) -> None:
    """One line of speed."""
    wall, used = time.perf_counter() - start, time.process_time() - cpu
    print(f"{name}: {count} images, {count / wall:.1f} images/s, {1000 * used / count:.0f} CPU-ms an image")


def print_table(figures: Sequence[Figure]) -> None:
    """The Markdown table."""
    rng = np.random.default_rng(0)
    print("\n| figure | images | value | bar | 95 % interval | two halves |\n|---|--:|--:|--:|---|---|")
    for figure in figures:
        value, (low, high), (first, second) = (
            figure.measure(figure.values, figure.labels),
            spread(figure, rng),
            halves(figure, rng),
        )
        verdict = "" if figure.bar is None else f"{figure.bar:.2f} {'met' if value >= figure.bar else 'MISSED'}"
        print(
            f"| {figure.name} | {len(figure.values)} | {value:.4f} | {verdict} "
            f"| {low:.4f} – {high:.4f} | {first:.4f}, {second:.4f} |"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=os.environ.get("CURATE_SHARED"), help="folder with realdata/")
    parser.add_argument("--yunet", type=Path, help="default: yunet_n_dynamic under SHARED/reference")
    parser.add_argument("--recognition", action="store_true", help="read the text too (three times as long)")
    parser.add_argument("--images", type=int, help="only the first N text images")
    parser.add_argument(
        "--stored", type=int, help="text and faces on pictures shrunk to this longer side, as in a pool"
    )
    parser.add_argument("--changed", choices=sorted(CHANGES), help="text and faces on pictures changed so")
    options = parser.parse_args()
    if options.shared is None:
        parser.error("name the folder with the labelled images: --shared DIR, or CURATE_SHARED")
    cv2.setNumThreads(1)
    root = options.shared / "realdata"
    yunet = options.yunet or options.shared / "reference/yunet/onnx__yunet_n_dynamic.onnx"
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, one thread a model")
    how = {"stored": options.stored, "changed": options.changed}
    figures = text_figures(root, recognition=options.recognition, limit=options.images, **how)
    print_table([*figures, *face_figures(root, yunet, **how), *pixel_figures(root)])


if __name__ == "__main__":
    main()

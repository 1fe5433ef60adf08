"""Plain facts of a picture's pixels: sharpness, entropy, contrast, chroma, flat share.

What tells blurred, blank, placeholder and greyscale pictures apart, as numbers; where the line is drawn is selection's.
Measured on the picture shrunk to at most 512 pixels, so that the numbers of large and small pictures compare.
Width, height, aspect and bytes are columns of the `images` table already.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from curate.score.canvas import Uint8, fit

SIDE = 512
FLAT_STEP = 8  # levels of 255: JPEG noise around a flat colour stays within it
COLUMNS = ("sharpness", "entropy", "contrast", "chroma", "flat_share")


def image_facts(images: Sequence[Uint8]) -> dict[str, npt.NDArray[np.float32]]:
    """float32 [N] columns of uint8 RGB pictures [h, w, 3]; greyscale [h, w] is taken too.

    `sharpness`: variance of the Laplacian of grey levels 0..255 (Pech-Pacheco et al. 2000); low when blurred.
    `entropy`: of the grey levels, in bits, 0..8; low when blank.
    `contrast`: standard deviation of the grey levels / 255, 0..0.5; 0 when blank.
    `chroma`: mean of (greatest - least channel) / 255, 0..1; 0 when greyscale.
    `flat_share`: share of pixels within 8 levels of the median colour, 0..1; near 1 for placeholders.
    """
    facts = np.array([_facts(image) for image in images], dtype=np.float32).reshape(-1, len(COLUMNS))
    return {column: facts[:, i] for i, column in enumerate(COLUMNS)}


def _facts(image: Uint8) -> tuple[float, float, float, float, float]:
    rgb = fit(image, SIDE)
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    sharpness = _deviation(cv2.Laplacian(grey, cv2.CV_16S)) ** 2
    shares = np.bincount(grey.reshape(-1), minlength=256) / grey.size
    present = shares[shares > 0]
    entropy = float(-(present * np.log2(present)).sum()) + 0.0  # + 0.0: a blank picture has 0, not -0
    planes = [rgb[:, :, channel].copy() for channel in range(3)]
    spread = cv2.subtract(
        cv2.max(cv2.max(planes[0], planes[1]), planes[2]), cv2.min(cv2.min(planes[0], planes[1]), planes[2])
    )
    middle = np.array([_median(plane) for plane in planes])
    flat = cv2.inRange(rgb, np.ceil(middle - FLAT_STEP), np.floor(middle + FLAT_STEP))
    chroma, flat_share = cv2.mean(spread)[0] / 255, cv2.countNonZero(flat) / grey.size
    return sharpness, entropy, _deviation(grey) / 255, chroma, flat_share


def _deviation(values: cv2.typing.MatLike) -> float:
    return float(cv2.meanStdDev(values)[1][0, 0])


def _median(plane: Uint8) -> float:
    """As np.median, from the histogram: 0.1 ms for 512 x 512, where sorting took 2."""
    below = np.bincount(plane.reshape(-1), minlength=256).cumsum()
    middle = (below[-1] - 1) // 2, below[-1] // 2
    return float(np.searchsorted(below, middle, side="right").mean())

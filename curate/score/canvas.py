"""Square canvases: pictures of any size, aspect kept, in one batch of one shape.

Detectors (text, faces) run on a fixed square so that every picture costs the same and batches have one shape.
A picture is shrunk to fit and lies in the top left corner; it is not enlarged here, since that invents detail and
was seen to add false faces. Refuses anything that is not a uint8 picture with 1 or 3 channels.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

Uint8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


def as_rgb(image: Uint8) -> Uint8:
    """Return the picture as uint8 [h, w, 3]; greyscale ([h, w] or [h, w, 1]) is repeated over three channels.

    Raises ValueError for another dtype, another number of channels, or an empty picture: the caller has not decoded.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"expected a uint8 picture [h, w, 3], got {image.dtype} {list(image.shape)}")
    flat = image[:, :, None] if image.ndim == 2 else image
    if flat.shape[2] == 1:
        return np.repeat(flat, 3, axis=2)
    if flat.shape[2] != 3:
        raise ValueError(f"expected 1 or 3 channels, got {flat.shape[2]}; flatten transparency when decoding")
    return flat


def fit(image: Uint8, side: int, *, smooth: bool = False) -> Uint8:
    """Shrink a picture to uint8 [h, w, 3] with longer side at most `side` pixels; smaller ones stay as they are.

    Halved by whole pixels while it is more than twice too large, then bilinear, as these detectors' own code shrinks:
    0.7 ms from 1024 to 736 pixels. `smooth`: each pixel the mean of its area, 5.0 ms; small letters need it (AUC of
    heavy text 0.995 and not 0.994).
    """
    rgb = as_rgb(image)
    height, width = rgb.shape[:2]
    scale = side / max(height, width)
    if scale >= 1.0:
        return rgb
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    while not smooth and rgb.shape[1] >= 2 * size[0] and rgb.shape[0] >= 2 * size[1]:
        rgb = _resized(rgb, (rgb.shape[1] // 2, rgb.shape[0] // 2), cv2.INTER_AREA)
    return _resized(rgb, size, cv2.INTER_AREA if smooth else cv2.INTER_LINEAR)


def _resized(rgb: Uint8, size: tuple[int, int], how: int) -> Uint8:
    return np.asarray(cv2.resize(rgb, size, interpolation=how), dtype=np.uint8)


def blob(pictures: Sequence[Uint8], side: int, *, fill: int, mean: float, scale: float, bgr: bool) -> Float32:
    """Lay the pictures on squares of `side` pixels: float32 [N, 3, side, side], (pixel - mean) * scale.

    `fill` is the value (0..255) of the free part; `bgr` swaps the channels, as models trained through OpenCV need.
    """
    squares = np.full((len(pictures), 3, side, side), (fill - mean) * scale, dtype=np.float32)
    for square, picture in zip(squares, pictures, strict=True):
        # Plane by plane into place: 1.4 ms for a 640 canvas, where OpenCV's blobFromImages takes 3.7.
        planes = cv2.split(picture)
        for plane, pixels in zip(square, planes[::-1] if bgr else planes, strict=True):
            part = plane[: picture.shape[0], : picture.shape[1]]
            np.subtract(pixels, np.float32(mean), out=part, dtype=np.float32)
            part *= np.float32(scale)
    return squares

"""`image_phash`: the perceptual hash that COYO publishes, bit for bit that of `imagehash.phash(hash_size=8)`.

RECIPES 9: 32 x 32 greyscale by Lanczos, type-II DCT along both axes, the 8 x 8 lowest frequencies with the constant
one, bit = above their median, row by row, most significant first. It refuses to be cleverer than that: a reduced
decode or another DCT would flip bits of flat images, whose coefficients are rounding noise around zero.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from scipy.fftpack import dct

from curate.score.decode import Picture, Unscorable
from curate.score.scorer import ImageScorer, ScorerSettings, Values

SIDE = 32
LOW = 8


class PhashSettings(ScorerSettings):
    """`column`: under which name."""

    column: str = "image_phash"


def phash(image: Image.Image) -> str:
    """16 lower-case hex digits, equal to `str(imagehash.phash(image))` for an image of any mode."""
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return hash_of(np.asarray(small))


def hash_of(pixels: npt.NDArray[np.uint8]) -> str:
    """The hash of uint8 [32, 32] grey values."""
    # Only 8 of the 32 rows are needed for the second transform; each row is transformed on its own, so bits agree.
    low = dct(dct(pixels, axis=0)[:LOW], axis=1)[:, :LOW]
    middle = np.partition(low, (31, 32), axis=None)[31:33]
    return np.packbits(low > middle.mean()).tobytes().hex()


class PhashScorer(ImageScorer[str]):
    """Everything happens in `prepare`, on the decoding threads."""

    settings_type: ClassVar[type[ScorerSettings]] = PhashSettings
    batch_size = 4096

    def __init__(self, name: str, settings: PhashSettings) -> None:
        super().__init__(name, settings)
        self._column = settings.column

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """One string column."""
        return (pa.field(self._column, pa.string()),)

    def prepare(self, picture: Picture, text: str | None) -> str | Unscorable:
        """The hash itself."""
        return phash(picture.image)

    def score(self, prepared: Sequence[str]) -> Mapping[str, Values]:
        """Passes the hashes on."""
        return {self._column: prepared}

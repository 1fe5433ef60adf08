"""Reference sets that come as images (`dedup.against.images`), measured by the scorer of the pool's own column.

    _references/<fingerprint>/<number>.npz    of a piece of a set: `ids` and `values` (hashes as text, or vectors) of
                                              its images that gave one; how many `images` were read
    _references/<fingerprint>/measured.json   written last: pieces, images, and how many gave none

A set is whatever `curate.image_sets` reads; an image's id is its path, or its place in a tar or dataset. One that
cannot be decoded guards against nothing: it is counted and told. It refuses a set of which no image can be measured.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from json import dumps

import numpy as np
import pyarrow as pa

from curate.engine.driver import OnDevice
from curate.errors import PlanError
from curate.image_sets import Piece, images_of, listing, pieces
from curate.metrics import Ticker
from curate.schema import Shard
from curate.score.columns import vectors_of
from curate.score.measured import Section, measure, packed, scorer_of
from curate.score.stage import specs_of
from curate.stage import CrossStep, Map
from curate.store import Store
from curate.vectors import get_arrays, put_arrays


class ReferenceImagesStep(CrossStep):
    """See the module's docstring. `folders`: where the values of each set are, by its place in the recipe."""

    name = "reference_images"

    def __init__(self, sets: Mapping[str, tuple[str, str]], section: Section) -> None:
        """`sets`: place in the recipe to (images, column of the pool). Raises PlanError."""
        self._sets = dict(sets)
        self._section = packed(section)
        self.folders: dict[str, str] = {}
        for place, (images, column) in self._sets.items():
            try:
                scorer = scorer_of(self._section, column)
            except PlanError as error:
                raise PlanError(f"{place}.images: {error}; name a file of hashes or embeddings instead") from None
            scorer.check()
            made = [spec.fingerprint for spec in specs_of(scorer, []) if column in spec.schema.names]
            told = sha256(dumps([made, column, listing(images, f"{place}.images")]).encode())
            self.folders[place] = f"_references/{told.hexdigest()[:16]}"

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every set is measured."""
        return all(store.exists(f"{folder}/measured.json") for folder in self.folders.values())

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Measure what is missing; images by set, and those without a value."""
        counts: Counter[str] = Counter()
        for place, folder in self.folders.items():
            if store.exists(f"{folder}/measured.json"):
                continue
            images, column = self._sets[place]
            parts = list(enumerate(pieces(images)))
            told = list(map_items(OnDevice(partial(_measure, store, self._section, column, folder)), parts))
            seen, usable = sum(one[0] for one in told), sum(one[1] for one in told)
            if not usable:
                raise PlanError(f"{place}.images: {images} holds no image that can be measured")
            store.put_json(f"{folder}/measured.json", {"pieces": len(parts), "images": seen, "unusable": seen - usable})
            counts[f"images of {place}"] += seen
            counts["images that guard nothing"] += seen - usable
        return counts


def reference_images_step(sets: Mapping[str, tuple[str, str]], section: Section) -> ReferenceImagesStep:
    """The step for these sets. Raises PlanError for a set or a column that is not there, WeightsError for a model."""
    return ReferenceImagesStep(sets, section)


def _measure(store: Store, section: str, column: str, folder: str, item: tuple[int, Piece]) -> tuple[int, int]:
    """(images, those with a value) of a piece."""
    number, piece = item
    path = f"{folder}/{number:08d}.npz"
    if store.exists(path):  # by a run that was killed
        held = get_arrays(store, path)
        return int(held["images"]), len(held["ids"])
    ids: list[str] = []
    values: list[np.ndarray] = []
    images = 0
    for names, measured in measure(section, column, images_of(piece)):
        images += len(names)
        if pa.types.is_fixed_size_list(measured.type):
            part, given = vectors_of(measured)
            given &= part.any(axis=1)
        else:
            part, given = np.array(measured.to_pylist(), object), measured.is_valid().to_numpy(zero_copy_only=False)
        ids += [name for name, has in zip(names, given, strict=True) if has]
        values.append(part[given])
    whole = np.concatenate(values) if ids else np.empty(0, np.float16)
    put_arrays(
        store, path, ids=np.array(ids, np.str_), values=whole if whole.ndim == 2 else whole.astype(np.str_),
        images=np.array(images),
    )  # fmt: skip
    return images, len(ids)

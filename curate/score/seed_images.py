"""Seed sets that come as images, embedded by the scorer of the pool's own vectors: one settings entry, one space.

    _seeds/<fingerprint>/<number>.npz     unit vectors of a chunk of images, float16 as the pool's are; images read
    _seeds/<fingerprint>/rows.json        vectors of each file; images read, and those that gave none

A set is whatever `curate.image_sets` reads. An image that cannot be decoded is counted and gives no vector. It refuses
a column of vectors that no image scorer of the recipe writes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from json import dumps

import numpy as np

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


class SeedImagesStep(CrossStep):
    """See the module's docstring. `folders`: where the vectors of each set are."""

    name = "seed_images"

    def __init__(self, sets: Mapping[str, str], section: Section, by: str, store: Store) -> None:
        """`sets`: name to images; `by`: the pool's column of vectors. Raises PlanError."""
        self._sets = dict(sets)
        self._section = packed(section)
        self._by = by
        self.folders: dict[str, str] = {}
        if not self._sets:
            return
        try:
            scorer = scorer_of(self._section, by)
        except PlanError as error:
            raise PlanError(f"retrieve.sets: {error}; name files of `embeddings` instead") from None
        scorer.check()
        vectors = specs_of(scorer, [])[-1].fingerprint
        for name, images in self._sets.items():
            told = sha256(dumps([vectors, by, listing(images, f"retrieve.sets.{name}.images")]).encode())
            self.folders[name] = f"_seeds/{told.hexdigest()[:16]}"

    def done(self, store: Store, shards: Sequence[Shard]) -> bool:
        """Whether every set has its vectors."""
        return all(store.exists(f"{folder}/rows.json") for folder in self.folders.values())

    def run(self, store: Store, shards: Sequence[Shard], map_items: Map, ticker: Ticker) -> Mapping[str, int]:
        """Embed what is missing; images by set, and those without a vector."""
        counts: Counter[str] = Counter()
        for name, folder in self.folders.items():
            if store.exists(f"{folder}/rows.json"):
                continue
            sources = pieces(self._sets[name])
            embed = OnDevice(partial(_embed, store, self._section, self._by, folder))
            rows, seen = [0] * len(sources), 0
            for number, vectors, images in map_items(embed, list(enumerate(sources))):
                rows[number] = vectors
                seen += images
            if not sum(rows):
                raise PlanError(f"retrieve.sets.{name}.images: {self._sets[name]} holds no image that can be embedded")
            store.put_json(f"{folder}/rows.json", {"rows": rows, "images": seen, "unusable": seen - sum(rows)})
            counts[f"images of {name}"] += seen
            counts["images without a vector"] += seen - sum(rows)
        return counts


def seed_images_step(sets: Mapping[str, str], section: Section, by: str, store: Store) -> SeedImagesStep:
    """The step for these sets. Raises PlanError for a set or a column that is not there, WeightsError for a model."""
    return SeedImagesStep(sets, section, by, store)


def _embed(store: Store, section: str, by: str, folder: str, item: tuple[int, Piece]) -> tuple[int, int, int]:
    """(number, vectors, images) of a piece."""
    number, piece = item
    path = f"{folder}/{number:08d}.npz"
    if store.exists(path):  # by a run that was killed
        held = get_arrays(store, path)
        return number, len(held["vectors"]), int(held["images"])
    parts, images = [], 0
    for names, measured in measure(section, by, images_of(piece)):
        images += len(names)
        vectors, given = vectors_of(measured)
        parts.append(vectors[given])
    width = next(field.type.list_size for field in scorer_of(section, by).embeddings if field.name == by)
    whole = np.concatenate([np.empty((0, width), np.float16), *parts])
    put_arrays(store, path, vectors=whole, images=np.array(images))
    return number, len(whole), images

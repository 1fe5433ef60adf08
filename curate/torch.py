"""A release as a map-style dataset of images, for self-supervised trainers (DINOv2, Web-SSL): no captions needed.

Every sample is one byte-range read at the place that the manifest names, so any sampler may ask in any order; 20 bytes
of memory a sample. A picture that cannot be decoded is replaced by its neighbour and counted: one bad image must not
end a run. It shuffles nothing and augments nothing; that is the sampler's and the transform's.
"""

import io
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from torch.utils.data import Dataset

from curate.errors import MissingTable, ReleaseError
from curate.store import Store

NEIGHBOURS = 100  # bad pictures in a row that are skipped before the release itself is to blame


class ReleaseDataset(Dataset[tuple[Any, Any]]):
    """Samples of one subset in the order of the release.

    `release` is the folder or URL that holds release.json; `transform` takes an RGB `PIL.Image`. An item is
    (transformed image, target), where the target is `()` as DINOv2's own datasets give it in pre-training, or what
    `target_transform` makes of the sample's number.
    Raises MissingTable when there is no such release or subset, ReleaseError when it was withdrawn.
    """

    def __init__(
        self,
        release: str,
        subset: str,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        self._release, self._subset = release.rstrip("/") or release, subset
        self._transform, self._target_transform = transform, target_transform
        self._opened: tuple[int, Store] | None = None
        self._failures = multiprocessing.get_context("spawn").Value("q", 0)  # shared with the loader's workers
        self._tars, self._tar, self._offset, self._length = self._places()

    def _places(self) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        store = self._store()
        note = store.get_json("release.json")
        if note is None or self._subset not in note["subsets"]:
            known = ", ".join(note["subsets"]) if note else "no release.json"
            raise MissingTable(f"{self._release}: no subset {self._subset} here ({known})")
        withdrawn = store.get_json("withdrawn.json")
        if withdrawn is not None:
            other = f"use {withdrawn['use']}" if withdrawn["use"] else "run its recipe again"
            raise ReleaseError(f"{self._release} was withdrawn: {withdrawn['reason']}; {other}")
        tars: list[str] = []
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        columns = ["subset", "tar", "offset", "length"]
        with store.open("manifest.parquet") as handle, pq.ParquetFile(handle) as file:
            for number in range(file.metadata.num_row_groups):  # a row group is a tar
                rows = file.read_row_group(number, columns=columns)
                if rows.num_rows and rows.column("subset")[0].as_py() == self._subset:
                    place = np.full(rows.num_rows, len(tars), dtype=np.int32)
                    parts.append((place, rows.column("offset").to_numpy(), rows.column("length").to_numpy()))
                    tars.append(f"{self._subset}/{rows.column('tar')[0].as_py()}")
        if not parts:
            return [], np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64)
        tar, offset, length = (np.concatenate(column) for column in zip(*parts, strict=True))
        return tars, tar, offset, length

    def _store(self) -> Store:
        """A store of this process: connections do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), Store(self._release))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return len(self._offset)

    @property
    def failures(self) -> int:
        """Pictures that could not be decoded so far, in all workers."""
        return int(self._failures.value)

    def get_image_data(self, index: int) -> bytes:
        """The stored bytes of sample `index` (DINOv2's name for it)."""
        place = [int(self._offset[index])], [int(self._length[index])]
        (data,) = self._store().read_ranges(self._tars[self._tar[index]], *place)
        return data

    def get_target(self, index: int) -> int:
        """The sample's number; there are no labels."""
        return index

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        for step in range(min(NEIGHBOURS, len(self))):
            place = (index + step) % len(self)
            data = self.get_image_data(place)
            try:
                with Image.open(io.BytesIO(data)) as opened:
                    image = opened.convert("RGB")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                with self._failures.get_lock():
                    self._failures.value += 1
                continue
            target = () if self._target_transform is None else self._target_transform(place)
            return (image if self._transform is None else self._transform(image)), target
        raise ReleaseError(f"{self._release}/{self._subset}: {NEIGHBOURS} samples in a row from {index} do not decode")

"""DINOv2's multi-crop (Web-SSL trains with it too) over a release, in two ways.

    python examples/multi_crop.py out/my-run/releases/0001-1a2b3c4d light --workers 8
    python examples/multi_crop.py out/my-run/releases/0001-1a2b3c4d light --workers 8 --stream

The first asks for samples in any order by byte ranges (`curate.torch.ReleaseDataset`: any sampler, any store); the
second streams tars, as one trains over a network. Both skip what does not decode. Numbers: dinov2/data/augmentations.py
and dinov2/configs/ssl_default_config.yaml; two global crops of 224 pixels and eight local ones of 98 or 96.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from curate.torch import ReleaseDataset

Crops = list[torch.Tensor]  # each float32 (3, size, size)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class MultiCrop:
    """An RGB picture becomes its crops, the global ones first."""

    def __init__(self, global_size: int = 224, local_size: int = 98, locals_: int = 8) -> None:
        first = [v2.GaussianBlur(9, (0.1, 2.0))]
        second = [v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], 0.1), v2.RandomSolarize(128, 0.2)]
        local = [v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], 0.5)]
        self._crops: list[Callable[[Image.Image], torch.Tensor]] = [
            _crop(global_size, (0.32, 1.0), first), _crop(global_size, (0.32, 1.0), second),
            *[_crop(local_size, (0.05, 0.32), local)] * locals_,
        ]  # fmt: skip

    def __call__(self, image: Image.Image) -> Crops:
        return [crop(image) for crop in self._crops]


def _crop(size: int, scale: tuple[float, float], blur: list[v2.Transform]) -> v2.Compose:
    colours = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
    return v2.Compose([
        v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(0.5),
        colours, v2.RandomGrayscale(0.2), *blur,
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
    ])  # fmt: skip


def collate(items: list[Crops]) -> Crops:
    """A batch: for each crop, float32 (n, 3, size, size)."""
    return [torch.stack(same) for same in zip(*items, strict=True)]


def map_style(release: str, subset: str, crops: MultiCrop, batch: int, workers: int) -> DataLoader[Crops]:
    """Samples by byte ranges, in a random order."""
    data = ReleaseDataset(release, subset, transform=crops)
    return DataLoader(
        data, batch, shuffle=True, num_workers=workers, drop_last=True,
        collate_fn=lambda items: collate([item for item, _ in items]),
    )  # fmt: skip


def streamed(release: str, subset: str, crops: MultiCrop, batch: int, workers: int) -> webdataset.WebLoader:
    """Tars from end to end; a release is shuffled already, a buffer mixes each epoch anew."""
    sizes = json.loads((Path(release) / subset / "sizes.json").read_text())
    data = (
        webdataset.WebDataset(
            [f"{release}/{subset}/{tar}" for tar in sorted(sizes)], shardshuffle=len(sizes),
            nodesplitter=webdataset.split_by_node,
        )
        .shuffle(2000)
        .decode("pilrgb", handler=webdataset.warn_and_continue)
        .map(lambda sample: crops(sample["jpg"]))
        .batched(batch, collation_fn=collate, partial=False)
    )  # fmt: skip
    return webdataset.WebLoader(data, batch_size=None, num_workers=workers)


def main() -> None:
    """Load some batches and tell how fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release")
    parser.add_argument("subset")
    parser.add_argument("--stream", action="store_true", help="WebDataset instead of byte ranges")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--workers", type=int, default=4)
    given = parser.parse_args()
    load = streamed if given.stream else map_style
    loader = load(given.release, given.subset, MultiCrop(), given.batch, given.workers)
    batches: Iterator[Crops] = islice(iter(loader), given.batches)
    started, count = time.perf_counter(), 0
    for crops in batches:
        count += len(crops[0])
        shapes = ", ".join(str(tuple(crop.shape)) for crop in (crops[0], crops[-1]))
    print(
        f"{count} pictures, {len(crops)} crops each ({shapes}), {count / (time.perf_counter() - started):.0f} a second"
    )


if __name__ == "__main__":
    main()

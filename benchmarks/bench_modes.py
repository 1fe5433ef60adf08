"""How far `preprocess: fast` lies from `exact`, for every score that has both, on real images.

    python benchmarks/bench_modes.py --images DIR [--count 96] [--shared DIR]

Trained weights are the demo's CLIP and, with --shared, LAION's published heads; other networks have random weights, so
that their figures say how much a network of that kind passes on of the pixels' difference, not what trained ones do.
The heads are asked at the measured distance: their published reference features, moved to the cosine that `fast` left.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench_score import gather, pixel_modes, random_clip

from curate.score.aesthetic import AestheticHead
from curate.score.decode import Picture, decode
from curate.score.nsfw import LaionNsfwHead
from curate.score.registry import build
from curate.score.scorer import Device, FeatureScorer, ImageScorer

Float32 = npt.NDArray[np.float32]
Entry = dict[str, Any]
PROMPTS = {"photo": "a photo", "drawing": "a drawing", "page": "a page of text"}
HEADS: Mapping[str, tuple[Callable[[Path], Callable[[Float32], Float32]], str]] = {
    "aesthetic_score_laion_v2": (AestheticHead.from_file, "sac+logos+ava1-l14-linearMSE.pth"),
    "aesthetic_score_laion_v1": (AestheticHead.from_file, "sa_0_4_vit_l_14_linear.pth"),
    "punsafe": (LaionNsfwHead.from_zip, "clip_autokeras_binary_nsfw.zip"),
}


def networks(folder: Path) -> dict[str, Entry]:
    """Random networks of the kinds that have both modes, in files."""
    import timm
    import torch
    from safetensors.torch import save_file
    from torchvision.models import resnet50
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    save_file(timm.create_model("resnet18", num_classes=3).state_dict(), folder / "timm.safetensors")
    torch.jit.script(resnet50(num_classes=512).eval()).save(str(folder / "sscd.pt"))
    sizes = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "image_size": 224, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "dino")
    cut = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    BitImageProcessor(**cut, resample=3).save_pretrained(folder / "dino")
    return {
        "torchscript_embed (SSCD's form, random)": {"scorer": "torchscript_embed", "weights": str(folder / "sscd.pt")},
        "hf_embed (DINOv2's form, random)": {"scorer": "hf_embed", "model": str(folder / "dino")},
        "timm_classifier (random)": {
            "scorer": "timm_classifier", "model": "resnet18", "weights": str(folder / "timm.safetensors"),
            "labels": ["a", "b", "c"],
        },
    }  # fmt: skip


def scored(entry: Entry, pictures: Sequence[Picture], texts: Sequence[str]) -> dict[str, Float32]:
    """The columns of one entry, and of a zero-shot head on it where it is CLIP."""
    section = {"clip_x": entry}
    if entry["scorer"] == "clip":
        section["kinds"] = {"scorer": "clip_zero_shot", "features": "clip_x", "prompts": PROMPTS}
    scorer, *heads = build(section)
    assert isinstance(scorer, ImageScorer)
    scorer.load(Device())
    parts = []
    for start in range(0, len(pictures), 16):
        pairs = zip(pictures[start : start + 16], texts[start : start + 16], strict=True)
        # a picture of its own for each call: detections are shared between scorers of one
        columns = dict(scorer.score([scorer.prepare(Picture(item.image, 0), text) for item, text in pairs]))
        for head in heads:
            assert isinstance(head, FeatureScorer)
            head.load(Device())
            columns |= head.score(np.asarray(columns["clip_x_image"], dtype=np.float32))
        parts.append(columns)
    return {name: np.concatenate([np.asarray(part[name], dtype=np.float32) for part in parts]) for name in parts[0]}


def report(title: str, exact: Float32, fast: Float32) -> float:
    """One row; returns the mean cosine of vectors, 1 for numbers."""
    if exact.ndim == 2:
        cosine = (exact * fast).sum(axis=1)
        print(f"| {title} | {len(exact)} | cosine {cosine.mean():.6f} | cosine {cosine.min():.6f} | |", flush=True)
        return float(cosine.mean())
    apart = np.abs(exact - fast)
    print(f"| {title} | {len(exact)} | {apart.mean():.5f} | {apart.max():.5f} | {exact.std():.4f} |", flush=True)
    return 1.0


def heads_at(cosine: float, shared: Path) -> None:
    """The published heads on reference features, and on the same moved by a random step to this cosine."""
    features = np.load(shared / "reference" / "clip_autokeras_binary_nsfw_x.npy").astype(np.float32)
    step = np.random.default_rng(0).normal(size=features.shape).astype(np.float32)
    step -= (step * features).sum(axis=1, keepdims=True) * features
    step /= np.linalg.norm(step, axis=1, keepdims=True)
    moved = cosine * features + np.sqrt(1 - cosine**2) * step
    halves = [part.astype(np.float16).astype(np.float32) for part in (features, moved)]  # as they stand in a table
    for name, (open_head, file) in HEADS.items():
        head = open_head(shared / "reference" / file)
        report(f"{name}, features at cosine {cosine:.6f}", head(halves[0]), head(halves[1]))


def main() -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images (default: drawn)")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--shared", type=Path, help="folder with reference/, for the published heads")
    settings = parser.parse_args()
    work = gather(settings.images, settings.count)
    pictures = [item for item in map(decode, work.images) if isinstance(item, Picture)]
    with tempfile.TemporaryDirectory(prefix="curate-bench-modes-") as name:
        demo = random_clip(Path(name) / "clip", "demo")
        entries: dict[str, Entry] = {
            "clip (demo)": {"scorer": "clip", "model": demo},
            "clip_text_masked (demo)": {"scorer": "clip_text_masked", "model": demo},
            **networks(Path(name)),
        }
        print("| score | images | mean | greatest | its spread |\n|---|---|---|---|---|")
        for title, entry in entries.items():
            exact, fast = (scored(entry | {"preprocess": mode}, pictures, work.texts) for mode in ("exact", "fast"))
            for column, values in exact.items():
                if not column.endswith("_text"):
                    cosine = report(f"{title}: {column}", values, fast[column])
                    if entry["scorer"] == "clip" and values.ndim == 2 and settings.shared:
                        heads_at(cosine, settings.shared)
    pixel_modes(work)


if __name__ == "__main__":
    main()

"""Precision and recall of pHash and of a small real embedding on labelled copies of real images.

    CURATE_SHARED=… python benchmarks/bench_copies.py [--wrong]
    CURATE_SHARED=… python benchmarks/bench_copies.py --planted 120    # copies made here, by kind of change; 2 minutes

`realdata/groups.tsv` says which images are copies of one another (edits, sizes, formats, crops, dihedral turns), which
only share a scene or template (`near`), and which look alike and are not copies (`hardneg`). Recall is over the pairs
inside a group of copies; precision over all pairs of all images that reach the threshold, pairs inside `near` groups
left out, since either answer is right there. The embedding is Coral's quantised MobileNet v1 (1,024 numbers, ImageNet
classification): it stands in for SSCD, whose weights are not there, and says nothing of how SSCD does.
"""

import argparse
import csv
import io
import os
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from curate.dedup.cosine import pairs_above
from curate.dedup.hamming import pairs_within
from curate.dedup.near_hashes import hashes_of
from curate.score.phash import phash

Pairs = set[tuple[int, int]]


def labelled(root: Path) -> tuple[list[str], dict[str, Pairs], dict[tuple[int, int], str]]:
    """(paths of all images, pairs of each kind, group of each pair inside a group)."""
    with (root / "manifest.csv").open(newline="") as handle:
        paths = {row["path"] for row in csv.DictReader(handle)}
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    with (root / "groups.tsv").open(newline="") as handle:
        for row in csv.DictReader(handle, delimiter="\t"):
            groups[row["kind"], row["group"]].append(row["path"])
            paths.add(row["path"])
    names = sorted(paths)
    number = {path: at for at, path in enumerate(names)}
    pairs: dict[str, Pairs] = defaultdict(set)
    group_of = {}
    for (kind, group), members in groups.items():
        for one, other in combinations(sorted(number[path] for path in members), 2):
            pairs[kind].add((one, other))
            group_of[one, other] = group
    return names, pairs, group_of


def features(images: list[Image.Image], model: Path) -> np.ndarray:
    """float32[n, 1024]: resized to 224 x 224 as it is, uint8 in."""
    session = onnxruntime.InferenceSession(str(model))
    given = session.get_inputs()[0].name
    found = []
    for image in images:
        pixels = np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR))
        found.append(session.run(None, {given: pixels[None]})[0].reshape(-1))
    return np.asarray(found, np.float32)


def changed(image: Image.Image) -> dict[str, Image.Image]:
    """One copy of each kind."""
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=50)
    width, height = image.size
    words = image.copy()
    box = (width // 20, height * 4 // 5, width * 19 // 20, height * 9 // 10)
    ImageDraw.Draw(words).rectangle(box, fill=(255, 255, 255))
    ImageDraw.Draw(words).text(box[:2], "SALE ends today", fill=(0, 0, 0), font_size=max(10, height // 12))
    return {
        "re-encode, quality 50": Image.open(encoded),
        "resize to a half": image.resize((max(8, width // 2), max(8, height // 2))),
        "crop of 5 % a side": image.crop((width // 20, height // 20, width - width // 20, height - height // 20)),
        "crop of 15 % a side": image.crop((width * 3 // 20, height * 3 // 20, width * 17 // 20, height * 17 // 20)),
        "colour and contrast + 40 %": ImageEnhance.Contrast(ImageEnhance.Color(image).enhance(1.4)).enhance(1.4),
        "mirrored": ImageOps.mirror(image),
        "a line of text over it": words,
    }


def print_planted(root: Path, names: list[str], model: Path) -> None:
    """Precision and recall of finding the original of each copy, by kind."""
    originals = []
    for name in names:
        with Image.open(root / name) as opened:
            originals.append(opened.convert("RGB"))
    hashes = hashes_of([phash(image) for image in originals])
    vectors = unit(features(originals, model))
    copies = [changed(image) for image in originals]
    print(f"{len(names)} unlike images, one copy of each kind; recall / precision of (copy, original) pairs\n")
    print("| copy | pHash 4 | pHash 10 | MobileNet 0.95 | MobileNet 0.9 |\n|---|---|---|---|---|")
    for kind in copies[0]:
        made = [copy[kind] for copy in copies]
        apart = np.bitwise_count(hashes_of([phash(image) for image in made])[:, None] ^ hashes)
        cosine = unit(features(made, model)) @ vectors.T
        told = []
        for near in (apart <= 4, apart <= 10, cosine >= 0.95, cosine >= 0.9):
            true = int(near.diagonal().sum())
            told.append(f"{true / len(names):.3f} / {true / max(1, int(near.sum())):.3f}")
        print(f"| {kind} | {' | '.join(told)} |", flush=True)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", default=os.environ.get("CURATE_SHARED"), help="folder with realdata and reference")
    parser.add_argument("--wrong", action="store_true", help="list the pairs that count as false")
    parser.add_argument("--planted", type=int, metavar="N", help="make copies of N of the images instead")
    options = parser.parse_args()
    if not options.shared:
        parser.error("--shared or CURATE_SHARED: where the labelled images are")
    root = Path(options.shared) / "realdata"
    names, pairs, group_of = labelled(root)
    model = next((Path(options.shared) / "reference/coral_mobilenet").glob("*extractor*.onnx"))
    if options.planted:
        grouped = {at for kind in pairs.values() for pair in kind for at in pair}
        alone = [name for at, name in enumerate(names) if at not in grouped]
        print_planted(root, alone[:: max(1, len(alone) // options.planted)], model)
        return
    opened = [Image.open(root / name) for name in names]
    hashes = hashes_of([phash(image) for image in opened])
    vectors = features(opened, model)
    copies = pairs["copy"]
    print(f"{len(names)} images, {len(copies)} pairs of copies, {len(pairs['near'])} near, "
          f"{len(pairs['hardneg'])} hard negatives\n")  # fmt: skip
    print("| by | found | recall of copies | without dihedral | precision | near found | hard negatives found |")
    print("|---|---|---|---|---|---|---|")
    turned = {pair for pair in copies if "dihedral" in group_of[pair]}
    searches = [(f"image_phash, radius {radius}", pairs_within(hashes, radius)) for radius in (0, 2, 4, 6, 8, 10)]
    searches += [(f"MobileNet, cosine {at:g}", pairs_above(vectors, at)[0]) for at in (0.99, 0.97, 0.95, 0.9, 0.85)]
    for name, array in searches:
        found = set(map(tuple, array.tolist()))
        judged = found - pairs["near"]
        true = found & copies
        upright = copies - turned
        shares = (len(true) / len(copies), len(found & upright) / len(upright), len(true) / max(1, len(judged)))
        told = " | ".join(f"{share:.3f}" for share in shares)
        print(f"| {name} | {len(found)} | {told} | {len(found & pairs['near'])} | {len(found & pairs['hardneg'])} |")
        if options.wrong:
            for one, other in sorted(judged - copies):
                print(f"    {names[one]}  {names[other]}  {group_of.get((one, other), '')}")
    print("\nRecall by group of copies (pairs; pHash radius 4, radius 10; cosine 0.95, 0.9):\n")
    print("| group | pairs | r 4 | r 10 | 0.95 | 0.9 |\n|---|---|---|---|---|---|")
    chosen = [pairs_within(hashes, 4), pairs_within(hashes, 10), pairs_above(vectors, 0.95)[0]]
    sets = [set(map(tuple, array.tolist())) for array in [*chosen, pairs_above(vectors, 0.9)[0]]]
    for group in sorted({group_of[pair] for pair in copies}):
        mine = {pair for pair in copies if group_of[pair] == group}
        shares = " | ".join(f"{len(mine & found) / len(mine):.2f}" for found in sets)
        print(f"| {group} | {len(mine)} | {shares} |")


if __name__ == "__main__":
    main()

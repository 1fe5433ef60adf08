"""Precision and recall of pHash and of a small real embedding on labelled copies of real images.

    CURATE_SHARED=… python benchmarks/bench_copies.py [--wrong]

`realdata/groups.tsv` says which images are copies of one another (edits, sizes, formats, crops, dihedral turns), which
only share a scene or template (`near`), and which look alike and are not copies (`hardneg`). Recall is over the pairs
inside a group of copies; precision over all pairs of all images that reach the threshold, pairs inside `near` groups
left out, since either answer is right there. The embedding is Coral's quantised MobileNet v1 (1,024 numbers, ImageNet
classification): it stands in for SSCD, whose weights are not there, and says nothing of how SSCD does.
"""

import argparse
import csv
import os
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

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


def features(root: Path, names: list[str], model: Path) -> np.ndarray:
    """float32[n, 1024]: resized to 224 x 224 as it is, uint8 in."""
    session = onnxruntime.InferenceSession(str(model))
    given = session.get_inputs()[0].name
    found = []
    for name in names:
        pixels = np.asarray(Image.open(root / name).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR))
        found.append(session.run(None, {given: pixels[None]})[0].reshape(-1))
    return np.asarray(found, np.float32)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", default=os.environ.get("CURATE_SHARED"), help="folder with realdata and reference")
    parser.add_argument("--wrong", action="store_true", help="list the pairs that count as false")
    options = parser.parse_args()
    if not options.shared:
        parser.error("--shared or CURATE_SHARED: where the labelled images are")
    root = Path(options.shared) / "realdata"
    names, pairs, group_of = labelled(root)
    model = next((Path(options.shared) / "reference/coral_mobilenet").glob("*extractor*.onnx"))
    hashes = hashes_of([phash(Image.open(root / name)) for name in names])
    vectors = features(root, names, model)
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

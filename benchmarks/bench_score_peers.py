"""CLIP similarity beside the peers, in one run: same images and captions, ViT-B/32 of random weights, fp32, one thread.

    python benchmarks/bench_score_peers.py --images DIR --data-juicer ENV/bin/python --clip-retrieval ENV/bin/python

curate's figure is of its whole score stage on a store (tar in, Parquet out); the peers' are of the calls that
`score_peers.py` makes, without what they do once (loading, start). A peer whose environment is not named is left out:
`pip install py-data-juicer==1.6.1`, `pip install clip-retrieval==2.45.0`, each in an environment of its own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from bench_score import Work, filled, gather, least, random_clip, timed

from curate.score.stage import score_stages
from curate.stage import run_shard


def hub_clip(folder: Path) -> str:
    """A CLIP ViT-B/32 of random weights in Hugging Face layout, with open_clip's vocabulary as its tokenizer's."""
    import open_clip.tokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    words = open_clip.tokenizer.SimpleTokenizer()
    folder.mkdir()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): number for word, number in words.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(pair) for pair in words.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    CLIPModel(CLIPConfig()).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(), CLIPTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


def ours(work: Work, folder: Path, rounds: int) -> tuple[float, float]:
    """CPU- and wall seconds of the stage, the least of the rounds after one that warms up."""
    model = random_clip(folder / "clip", "ViT-B-32-quickgelu")
    store, shard, samples, images = filled(folder / "root", work)
    (stage,) = score_stages({"clip_bench": {"scorer": "clip", "model": model, "device": "cpu"}}, samples, images)
    stage.setup()
    costs = []
    for _ in range(rounds + 1):
        costs.append(timed(lambda: run_shard(store, stage, shard), "cpu"))
        for spec in stage.tables:
            store.remove(store.shard_path(spec, shard.name))
    best = least(costs[1:])
    return best.cpu_s, best.wall_s


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images (default: drawn)")
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data-juicer", metavar="PYTHON", help="interpreter of an environment with py-data-juicer")
    parser.add_argument("--clip-retrieval", metavar="PYTHON", help="interpreter of an environment with clip-retrieval")
    settings = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    work = gather(settings.images, settings.count)
    peers = {
        "transformers": sys.executable, "data-juicer": settings.data_juicer, "clip-retrieval": settings.clip_retrieval,
    }  # fmt: skip
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, {settings.count} images, ViT-B/32, one thread\n")
    print("| scorer | CPU ms/image | images/s | CPU beside ours |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="curate-bench-peers-") as name:
        folder = Path(name)
        cpu_s, wall_s = ours(work, folder, settings.rounds)
        mine = cpu_s / settings.count
        print(f"| curate, the whole stage | {1000 * mine:.0f} | {settings.count / wall_s:.1f} | 1 |", flush=True)
        (folder / "images").mkdir()
        for row, (data, text) in enumerate(zip(work.images, work.texts, strict=True)):
            (folder / "images" / f"{row:06d}.jpg").write_bytes(data)
            (folder / "images" / f"{row:06d}.txt").write_text(text)
        model = hub_clip(folder / "hub")
        for peer, python in peers.items():
            if python is None:
                continue
            script = str(Path(__file__).with_name("score_peers.py"))
            command = [python, script, peer, str(folder / "images"), model]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"left out: {peer}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            each, rate = found["cpu_s"] / found["images"], found["images"] / found["wall_s"]
            print(f"| {peer} | {1000 * each:.0f} | {rate:.1f} | {each / mine:.2f} |", flush=True)


if __name__ == "__main__":
    main()

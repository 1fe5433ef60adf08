"""CLIP similarity of a folder's images by one peer, in the peer's own environment; prints one line of JSON.

    PYTHON benchmarks/score_peers.py transformers|data-juicer|clip-retrieval FOLDER MODEL

Run by `bench_score_peers.py`. FOLDER holds NNNNNN.jpg and NNNNNN.txt, MODEL a CLIP in Hugging Face layout. Nothing of
curate is imported. Costs are of the process and its children; loading and a first batch are left out.
"""

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

BATCH = 32
TIMEOUT_S = 900  # a peer that hangs is left out


def transformers_loop(files: list[Path], model: str) -> Callable[[int], None]:
    """The loop that a person writes: processor, model, cosine."""
    import torch
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    torch.set_num_threads(1)
    network, processor = CLIPModel.from_pretrained(model).eval(), CLIPProcessor.from_pretrained(model)

    def run(count: int) -> None:
        for start in range(0, count, BATCH):
            batch = files[start : min(start + BATCH, count)]
            images = [Image.open(io.BytesIO(file.read_bytes())).convert("RGB") for file in batch]
            texts = [file.with_suffix(".txt").read_text() for file in batch]
            inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, truncation=True)
            with torch.inference_mode():
                network(**inputs)

    return run


def data_juicer(files: list[Path], model: str) -> Callable[[int], None]:
    """Its image_text_similarity_filter, called as its executor calls it."""
    import torch
    from data_juicer.ops.filter.image_text_similarity_filter import ImageTextSimilarityFilter
    from data_juicer.utils.constant import Fields

    torch.set_num_threads(1)
    op = ImageTextSimilarityFilter(hf_clip=model, min_score=-1)
    mark, end = "<__dj__image>", "<|__dj__eoc|>"

    def run(count: int) -> None:
        for start in range(0, count, BATCH):
            batch = files[start : min(start + BATCH, count)]
            texts = [f"{mark} {file.with_suffix('.txt').read_text()} {end}" for file in batch]
            images = [[str(file)] for file in batch]
            op.compute_stats_batched({"text": texts, "images": images, Fields.stats: [{} for _ in batch]})

    return run


def clip_retrieval(files: list[Path], model: str) -> Callable[[int], None]:
    """Its inference on a folder of files, one preprocessing worker; a process a call, since its workers are forked."""
    code = """
import sys, torch
from clip_retrieval.clip_inference.main import main
torch.set_num_threads(1)
place, out, model, batch = sys.argv[1:]
main(input_dataset=place, output_folder=out, input_format="files", clip_model="hf_clip:" + model,
     batch_size=int(batch), num_prepro_workers=1, enable_metadata=False)
"""

    def run(count: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder, "in")
            place.mkdir()
            for file in files[:count]:
                for part in (file, file.with_suffix(".txt")):
                    (place / part.name).symlink_to(part)
            arguments = [str(place), str(Path(folder, "out")), model, str(BATCH)]
            subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=sys.stderr, timeout=TIMEOUT_S)

    return run


PEERS: dict[str, Callable[[list[Path], str], Callable[[int], None]]] = {
    "transformers": transformers_loop, "data-juicer": data_juicer, "clip-retrieval": clip_retrieval,
}  # fmt: skip


def cost(call: Callable[[int], None], count: int) -> tuple[float, float]:
    """(CPU-seconds of this process and its children, wall seconds)."""

    def used() -> float:
        spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in spent)

    cpu, wall = used(), time.perf_counter()
    call(count)
    return used() - cpu, time.perf_counter() - wall


def main(name: str, folder: str, model: str) -> None:
    """Measure all images less a first batch, so that what each call does once (loading, start) falls out."""
    files = sorted(Path(folder).glob("*.jpg"))
    with redirect_stdout(sys.stderr):
        run = PEERS[name](files, model)
        first = [cost(run, BATCH) for _ in range(2)][-1]
        whole = cost(run, len(files))
    counted: dict[str, Any] = {
        "images": len(files) - BATCH,
        "cpu_s": whole[0] - first[0],
        "wall_s": whole[1] - first[1],
    }
    print(json.dumps(counted))


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    main(*sys.argv[1:])

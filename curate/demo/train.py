"""Train the demo's tiny CLIP on drawings with other seeds than the demo's web: `python -m curate.demo.train`.

The demo must score real similarities without a download, so a model of about 3 MB ships in the package. It knows these
drawings and nothing else: it refuses any use beyond the demo, and nobody should rank real images with it.
"""

import argparse
import io
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from curate.demo.canvas import KINDS, Drawing
from curate.demo.drawing import as_alt_text, draw, encoded, wrong_caption
from curate.demo.paths import weights_dir
from curate.demo.printed import watermarked

TRAIN_SEED: Final = 1_000_000  # the web draws with seeds below this
TEST_SEED: Final = 2_000_000
KIND_SHARES: Final = (0.38, 0.36, 0.07, 0.09, 0.10)  # of KINDS; shapes and scenes have the most to tell apart
IMAGE_SIZE: Final = 64
CONTEXT_LENGTH: Final = 24
MEAN: Final = (0.5, 0.5, 0.5)
STD: Final = (0.25, 0.25, 0.25)
SPECIAL: Final = ("[PAD]", "[UNK]", "[BOS]")  # [EOS] comes last: open_clip pools the text where the id is largest


def drawn(count: int, first_seed: int) -> list[Drawing]:
    """`count` drawings as a web would show them: saved as JPEG, some watermarked, some with an alt text's words."""
    rng = np.random.default_rng(first_seed)
    drawings = []
    for i, kind in enumerate(rng.choice(len(KINDS), size=count, p=KIND_SHARES)):
        drawing = draw(KINDS[int(kind)], first_seed + i)
        image = watermarked(drawing.image, first_seed + i) if rng.random() < 0.1 else drawing.image
        with Image.open(io.BytesIO(encoded(image, "JPEG", int(rng.integers(55, 95))))) as opened:
            small = opened.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        caption = as_alt_text(drawing.caption, rng) if rng.random() < 0.4 else drawing.caption
        drawings.append(Drawing(small, caption, drawing.kind, drawing.subject))
    return drawings


def build_tokenizer(captions: Sequence[str], folder: Path) -> int:
    """Write a word-piece tokenizer of the captions' words, with letters for all other words; return its size.

    open_clip's own vocabulary of 49,408 would make 90 % of the weights embeddings that no caption here uses.
    """
    counts = Counter(word for caption in captions for word in re.findall(r"[a-z]+", caption.lower()))
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"-&()/%#@+"
    words = sorted(word for word, count in counts.items() if count >= 3 and len(word) > 1)
    ordered = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words, "[EOS]"]
    vocabulary = {piece: i for i, piece in enumerate(ordered)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=SPECIAL[1]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(piece, vocabulary[piece]) for piece in ("[BOS]", "[EOS]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT_LENGTH, **names}
    write_json(folder / "tokenizer_config.json", settings)
    return len(vocabulary)


def build_model(folder: Path, vocabulary: int) -> open_clip.CLIP:
    """Write open_clip's configuration to `folder` and return the untrained model that it describes."""
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": vocabulary, "width": 96, "heads": 3, "layers": 2}
    vision = {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 12, "head_width": 64, "patch_size": None}
    model = {"embed_dim": 128, "vision_cfg": vision, "text_cfg": {**text, "hf_tokenizer_name": "local"}}
    looks = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    write_json(folder / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": looks})
    created: open_clip.CLIP = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    return created


def train(folder: Path, count: int, epochs: int, seed: int, batch: int = 192) -> None:
    """Draw `count` images, train for `epochs`, and write model, configuration and tokenizer to `folder`."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    drawings = drawn(count, TRAIN_SEED * (1 + seed))
    print(f"drew {count} images in {time.monotonic() - began:.0f} s", flush=True)
    captions = [drawing.caption for drawing in drawings]
    model = build_model(folder, build_tokenizer(captions, folder))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(captions)
    pixels = torch.from_numpy(np.stack([np.asarray(drawing.image) for drawing in drawings]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    contrast = open_clip.ClipLoss()
    model.train()
    for epoch in range(epochs):
        losses = []
        order = torch.randperm(count)
        for start in range(0, count - batch + 1, batch):
            rows = order[start : start + batch]
            features = model(augmented(pixels[rows]), tokens[rows])
            loss = contrast(*features[:2], features[2])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 3.9)  # exp(3.9) = 49; higher only sharpens what is already right
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.3f}, {time.monotonic() - began:.0f} s", flush=True)
    state = {name: half(value) for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def augmented(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (n, 64, 64, 3) → normalised float32 (n, 3, 64, 64), flipped, shifted and lit at random."""
    images = pixels.permute(0, 3, 1, 2).float() / 255
    flip = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.where(flip, images.flip(3), images)
    images = images * (0.85 + 0.3 * torch.rand(len(images), 1, 1, 1))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="replicate")
    y, x = (int(v) for v in torch.randint(0, 9, (2,)))
    shifted = padded[:, :, y : y + IMAGE_SIZE, x : x + IMAGE_SIZE].clamp(0, 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (shifted - mean) / std


def half(value: torch.Tensor) -> torch.Tensor:
    """float16 for storage, which halves the file; integers as they are."""
    return value.half().contiguous() if value.is_floating_point() else value.contiguous()


def similarities(folder: Path, images: Sequence[Image.Image], captions: Sequence[str]) -> NDArray[np.float32]:
    """Cosine of image and caption, pair by pair, by the model in `folder` through open_clip's public factory: (n,)."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    cosines = []
    with torch.inference_mode():
        for start in range(0, len(images), 256):
            batch = torch.stack([preprocess(image) for image in images[start : start + 256]])
            seen = model.encode_image(batch, normalize=True)
            said = model.encode_text(tokenizer(list(captions[start : start + 256])), normalize=True)
            cosines.append((seen * said).sum(-1).numpy())
    return np.concatenate(cosines)


def auc(true: NDArray[np.float32], wrong: NDArray[np.float32]) -> float:
    """The chance that a true pair scores above a wrong one, ties counting half (Mann-Whitney)."""
    ordered = np.sort(wrong)
    below, upto = np.searchsorted(ordered, true, "left"), np.searchsorted(ordered, true, "right")
    return float((below + upto).mean() / 2 / len(wrong))


def measured(folder: Path, count: int = 1000) -> dict[str, float]:
    """AUC of true against wrong captions on `count` unseen drawings, overall and within each kind's true pairs."""
    drawings = drawn(count, TEST_SEED)
    rng = np.random.default_rng(TEST_SEED)
    images = [drawing.image for drawing in drawings]
    true = similarities(folder, images, [drawing.caption for drawing in drawings])
    wrong = similarities(folder, images, [wrong_caption(drawing, drawings, rng) for drawing in drawings])
    kinds = np.array([drawing.kind for drawing in drawings])
    results: dict[str, float] = {
        "all": auc(true, wrong),
        **{str(kind): auc(true[kinds == kind], wrong[kinds == kind]) for kind in KINDS},
    }
    results |= {"true_mean": float(true.mean()), "wrong_mean": float(wrong.mean())}
    results |= {f"true_p{p}": float(np.percentile(true, p)) for p in (1, 5, 10)}
    return results | {f"wrong_p{p}": float(np.percentile(wrong, p)) for p in (90, 95, 99)}


def write_json(path: Path, content: object) -> None:
    """Write `content` indented, with a last newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train, measure on unseen drawings through open_clip's public factory, and keep the figures beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=weights_dir(), help="folder for the weights (default: the package's)"
    )
    parser.add_argument("--count", type=int, default=9000, help="drawings to train on")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="other counts may round differently")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    train(settings.out, settings.count, settings.epochs, settings.seed)
    figures = {name: round(value, 4) for name, value in measured(settings.out).items()}
    asked = {"count": settings.count, "epochs": settings.epochs, "seed": settings.seed}
    write_json(settings.out / "training.json", {"settings": asked, "unseen_drawings": figures})
    print(json.dumps(figures, indent=2))
    if figures["all"] < 0.95:
        raise SystemExit(f"AUC {figures['all']} on unseen drawings is below 0.95; train longer (--epochs)")


if __name__ == "__main__":
    main()

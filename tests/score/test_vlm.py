"""The yes/no question, with a tiny random SmolVLM of transformers' own classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)  # fmt: skip

from curate.errors import PlanError
from curate.score.decode import Picture, decode
from curate.score.registry import build
from curate.score.scorer import Device
from curate.score.vlm import PROMPTS, VlmScorer
from tests.score.tiny import encoded, picture

SPECIAL = (
    "<pad>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>", "<video>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
)  # fmt: skip
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}:"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}{% else %}<image>{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tiny_vlm(folder: Path, words: tuple[str, ...] = ("yes", "Yes", "no", "No")) -> Path:
    """Random SmolVLM (32 px tiles) whose byte-level tokenizer has these words as tokens of their own."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    vocabulary = list(letters)
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                merges.append((word[: end - 1], word[end - 1]))
                vocabulary.append(word[:end])
    vocabulary = [*SPECIAL, *vocabulary]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end_of_utterance>")
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    size = {"longest_edge": 64}
    tiles = {"size": size, "max_image_size": {"longest_edge": 32}, "do_image_splitting": True}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**tiles), fast, SmolVLMVideoProcessor(size=size), image_seq_len=4, chat_template=TEMPLATE
    )
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SmolVLMConfig(
        text_config={
            "model_type": "llama", **sizes, "vocab_size": len(fast), "num_key_value_heads": 2, "pad_token_id": 0,
            "initializer_range": 0.3,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 8, "initializer_range": 0.3},
        image_token_id=fast.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    SmolVLMForConditionalGeneration(config).eval().save_pretrained(folder)
    return folder


def pictures() -> list[Picture]:
    """Of several shapes, so that they have several numbers of tiles."""
    sizes = [(64, 64), (64, 30), (30, 64), (20, 20), (64, 64)]
    found = [decode(encoded(picture(seed, size), "PNG")) for seed, size in enumerate(sizes)]
    return [item for item in found if isinstance(item, Picture)]


def test_p_yes_is_read_from_the_first_token(tmp_path: Path) -> None:
    """Guards against padding, tiles or tokens that shift the answer's place: batches must equal single images."""
    folder = tiny_vlm(tmp_path)
    (scorer,) = build({"webssl_light": {"scorer": "vlm_yes_no", "model": str(folder), "prompt": "webssl_light"}})
    assert isinstance(scorer, VlmScorer) and scorer.prompt == PROMPTS["webssl_light"]
    scorer.check()
    scorer.load(Device())
    prepared = [scorer.prepare(item, None) for item in pictures()]
    assert len({question["pixel_values"].shape[1] for question in prepared}) > 1
    found = np.asarray(scorer.score(prepared)["p_yes_webssl_light"])
    alone = np.concatenate([np.asarray(scorer.score([one])["p_yes_webssl_light"]) for one in prepared])
    assert np.allclose(found, alone, atol=1e-5) and found.std() > 1e-3

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPTS["webssl_light"]}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    answers = {word: processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "Yes", "no", "No")}
    for row, item in enumerate(pictures()):
        inputs = processor(text=[text], images=[[item.rgb]], return_tensors="pt")
        with torch.inference_mode():
            shares = model(**inputs).logits[0, -1].softmax(dim=-1)
        # "YES" and "NO" begin with the letters Y and N, which are tokens of their own here
        letters = {word: processor.tokenizer.convert_tokens_to_ids(word) for word in "YN"}
        yes = float(shares[answers["yes"]] + shares[answers["Yes"]] + shares[letters["Y"]])
        no = float(shares[answers["no"]] + shares[answers["No"]] + shares[letters["N"]])
        assert found[row] == pytest.approx(yes / (yes + no), abs=1e-5)


def test_a_tokenizer_that_cannot_tell_is_refused(tmp_path: Path) -> None:
    """Guards against a probability of tokens that stand for neither word."""
    folder = tiny_vlm(tmp_path)
    (scorer,) = build({"q": {"scorer": "vlm_yes_no", "model": str(folder), "prompt": "Is it a cat?"}})
    file = folder / "tokenizer.json"
    same = {"type": "Replace", "pattern": {"Regex": ".+"}, "content": "o"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": same}))
    with pytest.raises(PlanError, match="does not tell yes from no"):
        scorer.load(Device())


def test_the_published_prompts_are_verbatim() -> None:
    """Guards against a changed word: the prompt is the filter (Web-SSL, app. A)."""
    assert PROMPTS == {
        "webssl_light": "Does this image contain any readable text? Answer only yes or no.",
        "webssl_heavy": "Please think carefully before answering. Does this image contain charts, tables, or documents "
        "with readable text? Answer only yes or no.",
    }

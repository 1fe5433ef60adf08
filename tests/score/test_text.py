"""Text scorers against the libraries they stand on."""

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast, pipeline

from curate.errors import PlanError, WeightsError
from curate.score.registry import build
from curate.score.scorer import Device, TextScorer
from curate.score.stage import score_stages
from curate.stage import run_shard
from tests.score.tiny import SAMPLES, filled

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
TEXTS = ["a red house", "", "two  words and\nmore than that, of red houses", "Ein Haus", "x" * 900, "house " * 700]


def tokenizer() -> Tokenizer:
    """Words of a small vocabulary, with special tokens around."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "house", "two", "words", "and"]
    found = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return found


def loaded(entry: dict[str, object]) -> TextScorer:
    (scorer,) = build({"x": entry})
    assert isinstance(scorer, TextScorer)
    scorer.check()
    scorer.load(Device())
    return scorer


def test_counts_of_characters_words_and_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against special tokens, padding or truncation being counted, and bytes for characters."""
    made = tokenizer()
    made.enable_truncation(5)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "tokenizer.json"))
    found = loaded({"scorer": "text_stats", "tokenizers": {"bert": str(tmp_path)}}).score([*TEXTS, "süß 🙂"])
    assert found["text_length"] == [*(len(text) for text in TEXTS), 5]
    assert found["word_count"] == [3, 0, 9, 2, 1, 700, 2]
    assert found["num_tokens_bert"] == [3, 0, 10, 2, 1, 700, 2]
    with pytest.raises(WeightsError, match=r"score\.x\.tokenizers\.gpt: no file"):
        loaded({"scorer": "text_stats", "tokenizers": {"gpt": str(tmp_path / "none.json")}})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"score\.x\.tokenizers\.bert: .*`curate weights pull bert-base-uncased`"):
        loaded({"scorer": "text_stats", "tokenizers": {"bert": "bert-base-uncased", "gpt": "gpt2"}})


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_text_classifier_is_the_pipeline(tmp_path: Path, activation: str) -> None:
    """Guards against texts out of order (they are sorted by length) and padding that is read."""
    torch.manual_seed(0)
    labels = {0: "toxic", 1: "severe toxic", 2: "none"}
    config = BertConfig(
        vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        id2label=labels, label2id={label: number for number, label in labels.items()}, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=512,
    )  # fmt: skip
    fast.save_pretrained(tmp_path)
    entry = {"scorer": "hf_text_classifier", "model": str(tmp_path), "greatest": "text_unsafe", "batch_size": 2}
    found = loaded(entry | {"activation": activation}).score(TEXTS)
    classify = pipeline("text-classification", model=str(tmp_path), top_k=None, function_to_apply=activation)
    for row, answers in enumerate(classify(TEXTS, truncation=True, max_length=512)):
        expected = {answer["label"]: answer["score"] for answer in answers}
        assert found["p_toxic"][row] == pytest.approx(expected["toxic"], abs=1e-5)
        assert found["p_severe_toxic"][row] == pytest.approx(expected["severe toxic"], abs=1e-5)
        assert found["text_unsafe"][row] == pytest.approx(max(expected.values()), abs=1e-5)


def tiny_bert(folder: Path) -> PreTrainedTokenizerFast:
    """A random BERT encoder in a folder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=512,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("pool", ["pooler", "first", "mean"])
def test_a_text_encoder_is_the_models_own_forward(tmp_path: Path, pool: str) -> None:
    """Guards against padding that is read, texts out of order, and another vector than SimCSE's pooler output."""
    fast, encoder = tiny_bert(tmp_path), BertModel.from_pretrained(tmp_path).eval()
    entry = {"scorer": "hf_text_embed", "model": str(tmp_path), "pool": pool, "batch_size": 2}
    scorer = loaded(entry)
    found = scorer.score(TEXTS)["x_text"]
    assert [str(field.type) for field in scorer.embeddings] == ["fixed_size_list<item: halffloat>[16]"]
    for row, text in enumerate(TEXTS):
        with torch.inference_mode():
            outputs = encoder(**fast(text, return_tensors="pt", truncation=True))
        hidden = outputs.last_hidden_state[0]
        vector = {"pooler": outputs.pooler_output[0], "first": hidden[0], "mean": hidden.mean(dim=0)}[pool]
        assert torch.allclose(torch.as_tensor(found[row]), vector / vector.norm(), atol=1e-5)


def test_a_pooler_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Guards against random vectors: transformers makes up a pooler that a file does not hold, and only warns."""
    tiny_bert(tmp_path)
    BertModel.from_pretrained(tmp_path, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="no trained pooler; write pool: mean"):
        loaded({"scorer": "hf_text_embed", "model": str(tmp_path)})


def test_text_vectors_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    """Guards against a text embedder whose vectors reach no table, and a null text that gets one."""
    tiny_bert(tmp_path / "model")
    texts = ["a red house", None, "two words", "a red house"]
    store, shard = filled(tmp_path / "root", [None] * 4, texts)
    (stage,) = score_stages({"simcse": {"scorer": "hf_text_embed", "model": str(tmp_path / "model")}}, SAMPLES, None)
    assert [spec.name for spec in stage.tables] == ["embeddings_simcse"]
    stage.setup()
    run_shard(store, stage, shard)
    vectors = store.read(stage.tables[0], shard.name).column("simcse_text").to_pylist()
    assert vectors[1] is None and vectors[0] == vectors[3] != vectors[2]
    assert sum(float(value) ** 2 for value in vectors[0]) == pytest.approx(1, abs=1e-2)

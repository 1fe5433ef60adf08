"""A `transformers` text classifier loaded: texts in, probabilities out, short texts together so that few are padded."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from curate.score.scorer import Device, Float32

MAX_TOKENS = 512  # what BERT-like towers were trained with; longer captions are cut


class TextClassifier:
    """Model and tokenizer on one device."""

    def __init__(self, source: str, activation: str, device: Device, batch_size: int) -> None:
        torch.set_num_threads(device.threads)
        tokenizers: Any = AutoTokenizer  # untyped
        self._tokenizer = tokenizers.from_pretrained(source)
        model: Any = AutoModelForSequenceClassification.from_pretrained(source, use_safetensors=True)
        several = model.config.problem_type == "multi_label_classification"
        self._sigmoid = activation == "sigmoid" or (activation == "auto" and several)
        self._model = model.eval().to(device.name)
        self._device, self._batch_size = device.name, batch_size

    def probabilities(self, texts: Sequence[str]) -> Float32:
        """float32 [N, labels]."""
        order = sorted(range(len(texts)), key=lambda row: (len(texts[row]), row))
        found = np.zeros((len(texts), self._model.config.num_labels), dtype=np.float32)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            tokens = self._tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            ).to(self._device)
            on_gpu = self._device == "cuda"
            with torch.inference_mode(), torch.autocast(self._device, dtype=torch.float16, enabled=on_gpu):
                logits = self._model(**tokens).logits.float()
            found[rows] = (logits.sigmoid() if self._sigmoid else logits.softmax(dim=-1)).cpu().numpy()
        return found

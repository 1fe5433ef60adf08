"""`transformers` text models loaded: a classifier and an encoder. Texts in, numbers out, short texts together so that
few are padded. Half precision on a GPU only; safetensors only.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from curate.errors import PlanError
from curate.score.scorer import Device, Float32

MAX_TOKENS = 512  # what BERT-like towers were trained with; longer captions are cut
Pool = Literal["pooler", "first", "mean"]


class TextClassifier:
    """Model and tokenizer on one device."""

    def __init__(self, source: str, activation: str, device: Device, batch_size: int) -> None:
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            source, trust_remote_code=False, use_safetensors=True
        )
        several = model.config.problem_type == "multi_label_classification"
        sigmoid = activation == "sigmoid" or (activation == "auto" and several)

        def head(outputs: Any, _: torch.Tensor) -> torch.Tensor:
            logits = outputs.logits.float()
            return cast(torch.Tensor, logits.sigmoid() if sigmoid else logits.softmax(dim=-1))

        self._tower = _Tower(source, model, head, model.config.num_labels, MAX_TOKENS, device, batch_size)

    def probabilities(self, texts: Sequence[str]) -> Float32:
        """float32 [N, labels]."""
        return self._tower.run(texts)


class TextEncoder:
    """Unit vectors of texts."""

    def __init__(self, source: str, pool: Pool, max_tokens: int, device: Device, batch_size: int) -> None:
        """Raises PlanError where the pooler was asked for and the file has none."""
        found: Any = AutoModel.from_pretrained(
            source, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        model, info = found
        absent = [name for name in info["missing_keys"] if name.startswith("pooler")]
        if pool == "pooler" and (absent or getattr(model, "pooler", None) is None):
            raise PlanError(f"{source} has no trained pooler; write pool: mean, or pool: first")

        def head(outputs: Any, mask: torch.Tensor) -> torch.Tensor:
            return functional.normalize(_pooled(outputs, mask, pool).float(), dim=-1)

        self._tower = _Tower(source, model, head, model.config.hidden_size, max_tokens, device, batch_size)

    def vectors(self, texts: Sequence[str]) -> Float32:
        """float32 [N, d]."""
        return self._tower.run(texts)


def _pooled(outputs: Any, mask: torch.Tensor, pool: Pool) -> torch.Tensor:
    if pool == "pooler":
        return cast(torch.Tensor, outputs.pooler_output)
    if pool == "first":
        return cast(torch.Tensor, outputs.last_hidden_state[:, 0])
    weights = mask[:, :, None].float()
    return cast(
        torch.Tensor, (outputs.last_hidden_state.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    )


class _Tower:
    """A model, its tokenizer, and what is read of its outputs, given those and the attention mask."""

    def __init__(
        self,
        source: str,
        model: Any,
        head: Callable[[Any, torch.Tensor], torch.Tensor],
        width: int,
        max_tokens: int,
        device: Device,
        batch_size: int,
    ) -> None:
        torch.set_num_threads(device.threads)
        tokenizers: Any = AutoTokenizer  # untyped
        self._tokenizer = tokenizers.from_pretrained(source, trust_remote_code=False)
        self._model = model.eval().to(device.name)
        self._head, self._width, self._max_tokens = head, width, max_tokens
        self._device, self._batch_size = device.name, batch_size

    def run(self, texts: Sequence[str]) -> Float32:
        """float32 [N, width]."""
        order = sorted(range(len(texts)), key=lambda row: (len(texts[row]), row))
        found = np.zeros((len(texts), self._width), dtype=np.float32)
        on_gpu = self._device == "cuda"
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            part = [texts[row] for row in rows]
            tokens = self._tokenizer(
                part, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            ).to(self._device)
            with torch.inference_mode(), torch.autocast(self._device, dtype=torch.float16, enabled=on_gpu):
                found[rows] = self._head(self._model(**tokens), tokens["attention_mask"]).cpu().numpy()
        return found

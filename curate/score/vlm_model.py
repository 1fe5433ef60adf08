"""A `transformers` image-text-to-text model loaded for one question.

Images are processed one by one on CPU threads and put together here: texts padded on the left, so that the last place
is the answer's; image tensors stacked, with empty tiles where an image has fewer (SmolVLM leaves those out itself).
"""

import copy
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoProcessor

from curate.errors import PlanError
from curate.score.scorer import Device, Float32

Question = Mapping[str, torch.Tensor]
YES = ("yes", "Yes", "YES", " yes", " Yes", " YES")
NO = ("no", "No", "NO", " no", " No", " NO")
TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class VlmModel:
    """Model, processor, and the numbers of the tokens that begin yes and no."""

    def __init__(self, source: str, prompt: str, device: Device) -> None:
        torch.set_num_threads(device.threads)
        self._device = device.name
        processors: Any = AutoProcessor  # untyped
        self._own = threading.local()  # a processor a thread: their tokenizers refuse a second one
        self._processor = processors.from_pretrained(source, trust_remote_code=False)
        dtype = torch.bfloat16 if device.name == "cuda" else torch.float32  # what these models were trained in
        model: Any = AutoModelForImageTextToText.from_pretrained(
            source, trust_remote_code=False, use_safetensors=True, dtype=dtype
        )
        self._model = model.eval().to(device.name)
        tokenizer = self._processor.tokenizer
        self._yes, self._no = (_first_tokens(tokenizer, words) for words in (YES, NO))
        if not self._yes or not self._no or set(self._yes) & set(self._no):
            raise PlanError(f"{source}: its tokenizer does not tell yes from no by the first token")
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        self._text: str = self._processor.apply_chat_template(asked, add_generation_prompt=True)

    def prepare(self, image: Image.Image) -> Question:
        """Tensors of one image and the question, each with a batch of one."""
        if not hasattr(self._own, "processor"):
            self._own.processor = copy.deepcopy(self._processor)
        found = self._own.processor(text=[self._text], images=[[image]], return_tensors="pt")
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def ask(self, questions: Sequence[Question]) -> Float32:
        """P(yes) / (P(yes) + P(no)), float32 [N]."""
        batch = {name: self._together(name, [question[name] for question in questions]) for name in questions[0]}
        batch = {
            name: value.to(self._device, self._model.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }
        with torch.inference_mode():
            logits = self._model(**batch, logits_to_keep=1).logits[:, -1].float()
        shares = logits.softmax(dim=-1)
        yes, no = shares[:, self._yes].sum(dim=-1), shares[:, self._no].sum(dim=-1)
        return np.asarray((yes / (yes + no)).cpu().numpy(), dtype=np.float32)

    def _together(self, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        if name in TEXT_KEYS:
            longest = max(part.shape[1] for part in parts)
            fill = self._pad if name == "input_ids" else 0
            return torch.cat([functional.pad(part, (longest - part.shape[1], 0), value=fill) for part in parts])
        if len({part.shape[1:] for part in parts}) == 1:
            return torch.cat(list(parts))
        most = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
        filled = torch.zeros((sum(len(part) for part in parts), *most), dtype=parts[0].dtype)
        row = 0
        for part in parts:
            filled[(slice(row, row + len(part)), *(slice(0, size) for size in part.shape[1:]))] = part
            row += len(part)
        return filled


def _first_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """First tokens of the words, each once; those that stand for no letter (a lone space, unknown) are left out."""
    firsts = {tuple(tokenizer.encode(word, add_special_tokens=False))[:1] for word in words}
    numbers = {first[0] for first in firsts if first}
    return sorted(n for n in numbers if n != tokenizer.unk_token_id and tokenizer.decode([n]).strip())

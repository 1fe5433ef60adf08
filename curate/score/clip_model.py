"""An open_clip model loaded: pixels and tokens in, unit vectors out.

Mixed precision on a GPU only; vectors are normalised, and cosines taken, in float32. No gradient, no pickle.
"""

from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from torch.nn import functional
from torchvision import transforms

from curate.errors import WeightsError
from curate.score.batches import out_of_memory
from curate.score.clip_source import ClipSource
from curate.score.pixels import Mode, Pixels, in_parts, moved
from curate.score.scorer import Device

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TEXT_BATCH = 256
TEXT_STEP = 16  # captions of web pages are 10 to 30 tokens long; the context is 77

Float32 = npt.NDArray[np.float32]
Uint8 = npt.NDArray[np.uint8]


class ClipModel:
    """Both towers on one device."""

    def __init__(
        self, model: Any, preprocess: transforms.Compose, tokenizer: Any, device: Device, precision: str
    ) -> None:
        self._device = torch.device(device.name)
        self._dtype = DTYPES.get("fp16" if precision == "auto" else precision) if device.name == "cuda" else None
        self._model = model.eval().requires_grad_(False).to(self._device)
        if self._dtype is not None:
            self._model = self._model.to(memory_format=torch.channels_last)
        self._tokenizer = tokenizer
        self._tokenizing = Lock()  # tokenizers of the hub refuse a second thread ("Already borrowed")
        self.pixels = Pixels(preprocess, device.name)

    def tokens(self, text: str) -> npt.NDArray[np.int64]:
        """Token numbers, int64 [context]."""
        with self._tokenizing:
            return cast(npt.NDArray[np.int64], self._tokenizer([text])[0].numpy())

    def embed_images(self, pictures: Sequence[Uint8], mode: Mode, size: int | None = None) -> Float32:
        """Unit vectors float32 [N, d] of pictures as `Pixels.batch` takes them; `size` at a time."""

        def embed(part: Sequence[Uint8]) -> torch.Tensor:
            batch = self.pixels.batch(part, mode)
            with self._autocast():
                features = self._model.encode_image(batch)
            return functional.normalize(features.float(), dim=-1)

        with torch.inference_mode():
            return in_parts(pictures, size or len(pictures), embed)

    def embed_texts(self, tokens: npt.NDArray[np.int64]) -> Float32:
        """Unit vectors float32 [N, d] of int64 [N, context]."""
        lengths = self._lengths(tokens)
        order = np.argsort(lengths, kind="stable")
        alike = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1)  # of one length
        batches = [rows[start : start + TEXT_BATCH] for rows in alike for start in range(0, len(rows), TEXT_BATCH)]

        def embed(batch: Sequence[npt.NDArray[np.int64]]) -> torch.Tensor:
            rows = tokens[batch[0], : lengths[batch[0][0]]]
            with self._autocast():
                features = self._text_features(moved(torch.from_numpy(rows), self._device))
            return functional.normalize(features.float(), dim=-1)

        with torch.inference_mode():
            return in_parts(batches, 1, embed)[np.argsort(order)]

    def _lengths(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many tokens of each text the tower must see, in steps.

        Where attention is causal and the end token's feature is the text's, what stands behind the end changes nothing,
        and most of a context of 77 does.
        """
        context = tokens.shape[1]
        model = self._model
        if not (isinstance(model, open_clip.CLIP) and model.attn_mask is not None and model.text_pool_type == "argmax"):
            return np.full(len(tokens), context)
        ends = tokens.argmax(axis=1) + 1
        steps: npt.NDArray[np.int64] = -(-ends // TEXT_STEP)
        return np.minimum(steps * TEXT_STEP, context)

    def _text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """The model's `encode_text`, also for fewer tokens than its context."""
        model, length = self._model, tokens.shape[1]
        if length == model.context_length:
            return cast(torch.Tensor, model.encode_text(tokens))
        dtype = model.transformer.get_cast_dtype()
        hidden = model.token_embedding(tokens).to(dtype) + model.positional_embedding[:length].to(dtype)
        hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:length, :length]))
        pooled = hidden[torch.arange(len(tokens), device=hidden.device), tokens.argmax(dim=-1)]
        projection = model.text_projection
        if projection is not None:
            pooled = projection(pooled) if isinstance(projection, torch.nn.Linear) else pooled @ projection
        return cast(torch.Tensor, pooled)

    @property
    def scale(self) -> float:
        """By which cosines are multiplied before a softmax."""
        return float(self._model.logit_scale.exp())

    def probabilities(self, cosines: Sequence[float | None]) -> list[float | None]:
        """SigLIP's sigmoid(scale · cosine + bias) of each cosine."""
        scale, bias = self.scale, float(self._model.logit_bias)
        return [None if cosine is None else float(1 / (1 + np.exp(-(scale * cosine + bias)))) for cosine in cosines]

    def _autocast(self) -> torch.autocast:
        on = self._dtype is not None
        return torch.autocast(self._device.type, dtype=self._dtype, enabled=on)


@lru_cache(maxsize=8)
def _open(model: str, pretrained: str | None) -> tuple[Any, Any, Any]:
    try:
        created, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained)
    except Exception as error:  # pickle, zip, safetensors, shape and key errors, each of a class of its own
        if out_of_memory(error):
            raise
        raise WeightsError(f"{model}, {pretrained or 'own weights'}: no tensors of this model: {error}") from None
    return created, preprocess, open_clip.get_tokenizer(model)


def open_model(source: ClipSource, device: Device, precision: str) -> ClipModel:
    """Load a checked source; scorers of one process that name the same model share its weights."""
    if source.folder:
        model, preprocess, tokenizer = _open(f"local-dir:{source.folder}", None)
    elif source.file:
        model, preprocess, tokenizer = _open(source.model, str(source.file))
    else:
        model, preprocess, tokenizer = _open(source.model, source.pretrained)
    torch.set_num_threads(device.threads)  # not what the engine happens to allow: the count changes the last bits
    return ClipModel(model, preprocess, tokenizer, device, precision)

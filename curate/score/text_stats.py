"""`text_length` and `word_count`, as COYO publishes them, and token counts by tokenizers that lie on this machine.

`text_length` is in characters (code points); `word_count` counts words separated by white space. Token counts
(`num_tokens_<name>`) leave out the special tokens; COYO's are by BertTokenizer and GPT2TokenizerFast (RECIPES 9):
`tokenizers: {bert: bert-base-uncased, gpt: gpt2}`, two names of the weights manifest.

`collapse_whitespace: true` is COYO's second text rule: runs of white space become one space, ends are stripped, before
anything is counted. The column `text` holds the result, which takes the place of the source's (then `source_text`) in
dedup, subsets and releases. CLIP's tokenizers do the same to what they are given.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from curate.score.scorer import Device, ScorerSettings, TextScorer, Values
from curate.score.weight_ref import WeightRef


class TextStatsSettings(ScorerSettings):
    """`tokenizers`: column suffix to a name of the weights manifest, a `tokenizer.json`, or a folder that holds one."""

    tokenizers: dict[str, str] = Field(default_factory=dict)
    collapse_whitespace: bool = False


class TextStatsScorer(TextScorer):
    """Counts; needs no weights beyond the tokenizers that were asked for."""

    settings_type: ClassVar[type[ScorerSettings]] = TextStatsSettings

    def __init__(self, name: str, settings: TextStatsSettings) -> None:
        super().__init__(name, settings)
        self._collapse = settings.collapse_whitespace
        self._files = {
            suffix: _tokenizer_file(f"score.{name}.tokenizers.{suffix}", given)
            for suffix, given in sorted(settings.tokenizers.items())
        }
        self._tokenizers: dict[str, Any] = {}

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """int32 columns, after the collapsed text where it was asked for."""
        counts = ["text_length", "word_count", *(f"num_tokens_{suffix}" for suffix in self._files)]
        text = [pa.field("text", pa.string())] * self._collapse
        return (*text, *(pa.field(column, pa.int32()) for column in counts))

    def identity(self) -> Mapping[str, Any]:
        """The tokenizers by content."""
        return {"tokenizers": {suffix: file.sha256 for suffix, file in self._files.items() if file.sha256}}

    def check(self) -> None:
        """Raises WeightsError when a tokenizer file is not there."""
        for file in self._files.values():
            file.path()

    def load(self, device: Device) -> None:
        """Open the tokenizers."""
        if self._files:
            from tokenizers import Tokenizer  # noqa: PLC0415  # only where token counts were asked for

            self._tokenizers = {suffix: Tokenizer.from_file(str(file.path())) for suffix, file in self._files.items()}
            for tokenizer in self._tokenizers.values():
                tokenizer.no_truncation()
                tokenizer.no_padding()

    def score(self, texts: Sequence[str]) -> Mapping[str, Values]:
        """One count a text and column."""
        columns: dict[str, Values] = {}
        if self._collapse:
            texts = columns["text"] = [" ".join(text.split()) for text in texts]
        columns |= {
            "text_length": [len(text) for text in texts],
            "word_count": [len(text.split()) for text in texts],
        }
        for suffix, tokenizer in self._tokenizers.items():
            encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            columns[f"num_tokens_{suffix}"] = [len(encoding.ids) for encoding in encodings]
        return columns


def _tokenizer_file(where: str, given: str) -> WeightRef:
    folder = Path(given).expanduser()
    return WeightRef(where, str(folder / "tokenizer.json") if folder.is_dir() else given)

"""`text_length` and `word_count`, as COYO publishes them, and token counts by tokenizers that lie on this machine.

`text_length` is in characters (code points); `word_count` counts words separated by white space. Token counts
(`num_tokens_<name>`) leave out the special tokens; COYO's are by BertTokenizer and GPT2TokenizerFast (RECIPES 9), whose
`tokenizer.json` the user names: `tokenizers: {bert: PATH, gpt: PATH}`.

`collapse_whitespace: true` is COYO's second text rule: runs of white space become one space, ends are stripped, before
anything is counted. The column `text` holds the result, which takes the place of the source's (then `source_text`) in
dedup, subsets and releases. CLIP's tokenizers do the same to what they are given.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from curate.errors import WeightsError
from curate.score.scorer import Device, ScorerSettings, TextScorer, Values
from curate.score.weight_files import sha256_of


class TextStatsSettings(ScorerSettings):
    """`tokenizers`: column suffix to a `tokenizer.json` of the `tokenizers` library, or a folder that holds one."""

    tokenizers: dict[str, str] = Field(default_factory=dict)
    collapse_whitespace: bool = False


class TextStatsScorer(TextScorer):
    """Counts; needs no weights beyond the tokenizers that were asked for."""

    settings_type: ClassVar[type[ScorerSettings]] = TextStatsSettings

    def __init__(self, name: str, settings: TextStatsSettings) -> None:
        super().__init__(name, settings)
        self._collapse = settings.collapse_whitespace
        self._files = {suffix: _tokenizer_file(path) for suffix, path in sorted(settings.tokenizers.items())}
        self._tokenizers: dict[str, Any] = {}

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """int32 columns, after the collapsed text where it was asked for."""
        counts = ["text_length", "word_count", *(f"num_tokens_{suffix}" for suffix in self._files)]
        text = [pa.field("text", pa.string())] * self._collapse
        return (*text, *(pa.field(column, pa.int32()) for column in counts))

    def identity(self) -> Mapping[str, Any]:
        """The tokenizers by content."""
        return {"tokenizers": {suffix: sha256_of(file) for suffix, file in self._files.items() if file.is_file()}}

    def check(self) -> None:
        """Raises WeightsError when a tokenizer file is not there."""
        for suffix, file in self._files.items():
            if not file.is_file():
                raise WeightsError(f"score.{self.name}.tokenizers.{suffix}: no file {file}; save the tokenizer there")

    def load(self, device: Device) -> None:
        """Open the tokenizers."""
        if self._files:
            from tokenizers import Tokenizer  # noqa: PLC0415  # only where token counts were asked for

            self._tokenizers = {suffix: Tokenizer.from_file(str(file)) for suffix, file in self._files.items()}
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


def _tokenizer_file(path: str) -> Path:
    given = Path(path).expanduser().absolute()
    return given / "tokenizer.json" if given.is_dir() else given

"""The parts of a prompt as tokens: each is made on its own, so a title has the same tokens wherever it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from udfs.text_encoder import readable

# Of a title no more is read.
_TITLE_CHARACTERS = 300


class PromptTokens:
    """A tokenizer (of transformers) for the parts of prompts."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # A text that spells a special token must not end the part it stands in.
        self._special = [token for token in tokenizer.all_special_tokens if token.strip()]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token numbers of each text, with nothing added."""
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return [list(ids) for ids in self.tokenizer(list(texts), **options)["input_ids"]] if texts else []

    def clean(self, title: str) -> str:
        """The beginning of a title, on one line, without special tokens."""
        text = " ".join(readable(title, _TITLE_CHARACTERS).split())[:_TITLE_CHARACTERS]
        while any(token in text for token in self._special):  # until what is left spells none either
            for token in self._special:
                text = text.replace(token, " ")
        return text

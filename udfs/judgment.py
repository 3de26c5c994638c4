"""Text to judgment, ColdLLM's way (arXiv 2402.09176, section 4.3): a language model reads what a user chose and a new item,
and is asked whether the user would choose it too; log p(Yes) - log p(No) of its next token is the pair's score.

The difference of the two log-probabilities is the difference of the two logits, so two rows of the model's head are all that
is computed of it. Pairs run sorted by length in batches of a token budget, as `udfs.text_encoder` runs texts. With
`share_prefix` the users' part of the prompt runs once a user and its keys and values serve all of the user's items.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import AutoTokenizer, DynamicCache

from schemas.errors import ColdRefreshError
from udfs.encoder_recipe import is_causal
from udfs.prompt_tokens import PromptTokens
from udfs.text_encoder import TextEncoder, batches, padded

Ints = NDArray[np.int64]
_MARK = "\x00"


class JudgmentError(ColdRefreshError):
    """The model cannot judge, or a prompt is longer than it reads: the message says which."""


@dataclass(frozen=True)
class Question:
    """What the model is asked. {history} stands for the user's titles, one a line; {title} for the item's."""

    system: str = "You answer with Yes or No."
    user: str = "A person saved these:\n{history}\n"
    item: str = '\nHere is another one: "{title}"\nWould the same person save it too? Answer Yes or No.'
    yes: str = "Yes"
    no: str = "No"


class Judge:
    """A causal language model that scores (user, item) pairs.

    `direction` [width] and `bias`: a pair's score is its last hidden state times the direction, plus the bias. They start as
    the difference of the head's rows of Yes and No, and 0; `udfs.judgment_training` fits them.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        question: Question | None = None,
        batch_tokens: int = 8192,
        cache_tokens: int = 16384,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
    ) -> None:
        """Load the model of `directory` (see `udfs.model_files.find_model`).

        Args:
            batch_tokens: tokens of a batch, padding included.
            cache_tokens: with `share_prefix`, tokens whose keys and values exist at a time, padding included.

        Raises:
            ModelError: the files cannot be loaded.
            JudgmentError: Yes and No begin with the same token, or the model is no causal language model with its head.
        """
        if not is_causal(json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))):
            raise JudgmentError(f"the model in {directory} is an encoder: only a causal language model can answer")
        self.question = question or Question()
        self.encoder = TextEncoder(
            directory, pooling="last_token", batch_tokens=batch_tokens, dtype=dtype, device=device
        )
        self.cache_tokens = cache_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        self._tokens = PromptTokens(self._tokenizer)
        self._head, self._tail, space = self._frame()
        yes, no = (ids[0] for ids in self._tokens.ids([space + self.question.yes, space + self.question.no]))
        if yes == no:
            raise JudgmentError(
                f"{self.question.yes!r} and {self.question.no!r} begin with the same token of this model: "
                "no score can tell them apart; choose other words"
            )
        rows = _head_rows(Path(directory), self.encoder, [yes, no])
        self.direction = rows[0] - rows[1]
        self.bias = 0.0

    def score(
        self,
        histories: Sequence[Sequence[str]],
        titles: Sequence[str],
        users: Ints,
        items: Ints,
        *,
        share_prefix: bool = True,
    ) -> NDArray[np.float32]:
        """log p(Yes) - log p(No) of n pairs, [n]; the arguments are those of `states`."""
        found = self.states(histories, titles, users, items, share_prefix=share_prefix)
        return found @ self.direction.cpu().numpy() + np.float32(self.bias)

    def states(
        self,
        histories: Sequence[Sequence[str]],
        titles: Sequence[str],
        users: Ints,
        items: Ints,
        *,
        share_prefix: bool = True,
    ) -> NDArray[np.float32]:
        """The hidden state from which the model would answer, of n pairs, [n, width] float32.

        It depends on its own pair alone: batches and the shared prefix change only how sums are rounded, as
        `udfs.text_encoder` says.

        Args:
            histories: titles that a user chose, a list a user; titles: of the items.
            users, items: [n] each, rows of `histories` and of `titles`.

        Raises:
            JudgmentError: a prompt has more tokens than the model reads.
        """
        names, users = np.unique(users, return_inverse=True)
        prefixes = self._tokens.ids([self._prefix(histories[user]) for user in names])
        numbers, items = np.unique(items, return_inverse=True)
        suffixes = self._tokens.ids([self._suffix(titles[item]) for item in numbers])
        lengths = [len(prefixes[u]) + len(suffixes[i]) for u, i in zip(users, items, strict=True)]
        limit = getattr(self.encoder.model.config, "max_position_embeddings", None)
        if limit and max(lengths, default=0) > limit:
            raise JudgmentError(
                f"a prompt has {max(lengths)} tokens, the model reads {limit}: name fewer titles of a user's history"
            )
        found = np.empty((len(lengths), self.encoder.width), np.float32)
        with torch.inference_mode():
            if share_prefix:
                rows_of: list[list[int]] = [[] for _ in prefixes]
                for row, user in enumerate(users):
                    rows_of[user].append(row)
                of_row = [suffixes[item] for item in items]
                for group in batches(
                    [len(prefix) for prefix in prefixes], self.encoder.batch_tokens, self.encoder.device
                ):
                    rows = [(row, number) for number, user in enumerate(group) for row in rows_of[user]]
                    self._shared([prefixes[user] for user in group], rows, of_row, found)
            else:
                for batch in batches(lengths, self.encoder.batch_tokens, self.encoder.device):
                    whole = [prefixes[users[row]] + suffixes[items[row]] for row in batch]
                    found[batch] = self.encoder.forward(whole).cpu().numpy()
        return found

    def prefix(self, history: Sequence[str]) -> list[int]:
        """The tokens of a user's part of the prompt; those of an item's part (`suffix`) follow it."""
        return self._tokens.ids([self._prefix(history)])[0]

    def suffix(self, title: str) -> list[int]:
        """The tokens of an item's part of the prompt, up to where the model would answer."""
        return self._tokens.ids([self._suffix(title)])[0]

    def _prefix(self, history: Sequence[str]) -> str:
        before, after = self.question.user.split("{history}")
        return self._head + before + "\n".join(f"- {self._tokens.clean(title)}" for title in history) + after

    def _suffix(self, title: str) -> str:
        before, after = self.question.item.split("{title}")
        return before + self._tokens.clean(title) + after + self._tail

    def _shared(
        self, prefixes: list[list[int]], rows: list[tuple[int, int]], suffixes: list[list[int]], found: np.ndarray
    ) -> None:
        """Fill `found` [n, width] at the rows (row, number of its prefix); `suffixes` are of all n rows."""
        device, model = self.encoder.device, self.encoder.model
        # Padding on the right: no row of attention is empty, and the positions of the suffixes are given.
        ids, mask = padded(prefixes, device)
        position = torch.arange(ids.shape[1], device=device)[None].expand_as(ids)
        layers = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True).past_key_values.layers
        length = mask.sum(1)
        # Similar suffixes together, as many as the cache takes with a copy of their prefixes.
        for batch in batches(
            [ids.shape[1] + len(suffixes[row]) for row, _ in rows], self.cache_tokens, self.encoder.device
        ):
            of = torch.tensor([rows[at][1] for at in batch], device=device)
            cache = DynamicCache()
            for number, layer in enumerate(layers):
                cache.update(layer.keys[of], layer.values[of], number)
            own_ids, own = padded([suffixes[rows[at][0]] for at in batch], device)
            hidden = model(
                input_ids=own_ids,
                attention_mask=torch.cat([mask[of], own], 1),
                position_ids=length[of][:, None] + torch.arange(own.shape[1], device=device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            last = hidden[torch.arange(len(batch), device=device), own.sum(1) - 1]
            found[[rows[at][0] for at in batch]] = last.float().cpu().numpy()

    def _frame(self) -> tuple[str, str, str]:
        """What stands before the user's part, after the item's, and directly before an answer."""
        if not self._tokenizer.chat_template:
            return self._tokenizer.bos_token or "", "\nAnswer:", " "
        messages = [{"role": "system", "content": self.question.system}, {"role": "user", "content": _MARK}]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        head, _, tail = text.partition(_MARK)
        return head, tail, ""


def _head_rows(directory: Path, encoder: TextEncoder, tokens: list[int]) -> torch.Tensor:
    """Rows `tokens` of the model's output head, [n, width] float32 on the encoder's device."""
    config: Any = encoder.model.config
    if config.tie_word_embeddings:
        weight = encoder.model.get_input_embeddings().weight
        return weight.detach()[tokens].float()
    index = directory / "model.safetensors.index.json"
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
    name = "lm_head.weight"
    with safe_open(directory / files.get(name, "model.safetensors"), framework="pt") as weights:
        if name not in list(weights.keys()):
            raise JudgmentError(f"the model in {directory} has no {name}, from which an answer would come")
        rows = weights.get_slice(name)
        return torch.stack([rows[token] for token in tokens]).float().to(encoder.device)

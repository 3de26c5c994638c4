"""What A-LLMRec's second stage asks a language model (arXiv 2404.11343, section 4.2): which of these titles comes next.

The user's projected vector stands first, every title of the history and of the candidates is followed by its item's. These
soft tokens are places in the sequence: the tokenizer gets no new tokens, and no title can spell one. A prompt may leave the
candidates out, which the paper's does not: then it is the list of the history, and the answer is its next line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from udfs.allmrec_examples import AllmrecError
from udfs.prompt_tokens import PromptTokens
from udfs.sequences import Ints

# What stands at a soft token's place among the token numbers: any token, it is never looked up.
_PLACE = 0
_UNTITLED = "untitled"


@dataclass(frozen=True)
class Wording:
    """How a domain speaks of its items."""

    noun: str = "item"
    verb: str = "buy"
    past: str = "bought"


#: The paper's three.
DOMAINS = {
    "items": Wording(),
    "movies": Wording("movie", "watch", "watched"),
    "games": Wording("game", "play", "played"),
}


@dataclass(frozen=True)
class PromptOptions:
    """What a prompt says. Without `user` or `items` those soft tokens are left out (the paper's ablations); without `candidates`
    the prompt does not name them, and a user is asked about once, whatever there is to rank."""

    wording: Wording = Wording()
    history: int = 10  # titles of a history, the last ones
    title_tokens: int = 24  # of a title no more are read or asked for; the paper's code takes all
    user: bool = True
    items: bool = True
    candidates: bool = True


@dataclass(frozen=True)
class Prompt:
    """A prompt as token numbers, with its soft tokens' places among them.

    user: the user's place, -1 if there is none. places: those of items; items: their numbers.
    """

    tokens: list[int]
    user: int
    places: list[int]
    items: list[int]


class Prompts:
    """Prompts about the items of one catalogue, and the answers to them: a title a line, as short as lists can be.

    texts: the titles as they came; they become tokens when they are first asked for, since a worker's users meet a small part
    of a large catalogue. end: the tokens that end a line, and so an answer.
    """

    def __init__(self, tokenizer: Any, titles: Sequence[str], options: PromptOptions) -> None:
        """`titles`: of items 0 .. I - 1; an empty one becomes "untitled". `tokenizer`: of transformers.

        Raises:
            AllmrecError: no token of a title may be read.
        """
        if options.title_tokens < 1:
            raise AllmrecError(f"title_tokens is {options.title_tokens}: of a title one token must be read at least")
        self.options = options
        self._tokens, self.texts, self._read = PromptTokens(tokenizer), titles, dict[int, list[int]]()
        own = options.wording
        parts = [
            " is a user representation." if options.user else "",
            f" This user has {own.past} these {own.noun}s so far:\n",
            f" This user has {own.past} nothing so far.\n",
            f"Recommend one {own.noun} for this user to {own.verb} next from these {own.noun}s:\n",
            "The recommendation is:\n",
            "\n",
        ]
        self._user, self._past, self._none, self._ask, self._recommendation, self.end = self._tokens.ids(parts)
        # A model's first position is often where attention goes that goes nowhere: it should not be the user's.
        self._first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def __len__(self) -> int:
        return len(self.texts)

    def title(self, item: int) -> list[int]:
        """The tokens of an item's title, as far as it is read."""
        if item not in self._read:
            clean = " ".join(self._tokens.clean(self.texts[item]).split()) or _UNTITLED
            self._read[item] = self._tokens.ids([clean])[0][: self.options.title_tokens]
        return self._read[item]

    def prompt(self, history: Ints, candidates: Ints) -> Prompt:
        """The prompt of a user with this history [any], oldest first, who is to choose among `candidates` [C].

        The candidates, if they are named, stand in an order that only the history and the set of them decide: where the caller
        has the true one says nothing, and the same question is asked the same way in every batch.
        """
        tokens, places, items = list(self._first), [], []

        def name(number: int) -> None:
            tokens.extend(self.title(number))
            if self.options.items:
                places.append(len(tokens))
                items.append(number)
                tokens.append(_PLACE)
            tokens.extend(self.end)

        user = -1
        if self.options.user:
            user = len(tokens)
            tokens.append(_PLACE)
        tokens.extend(self._user)
        last = history[max(0, len(history) - self.options.history) :]
        listed = self.options.candidates
        tokens.extend(self._past if len(last) or not listed else self._none)
        for number in last.tolist():
            name(number)
        if listed:
            tokens.extend(self._ask)
            for number in _shuffled(last, candidates).tolist():
                name(number)
            tokens.extend(self._recommendation)
        return Prompt(tokens, user, places, items)

    def nobody(self) -> Prompt:
        """The prompt, without candidates, of a user of whom nothing is known."""
        return Prompt([*self._first, *self._past], -1, [], [])

    def answer(self, item: int) -> list[int]:
        """The tokens of an item's title and of the end of an answer."""
        return [*self.title(item), *self.end]


def _shuffled(history: Ints, candidates: Ints) -> Ints:
    ordered = np.sort(candidates.astype(np.int64))
    said = np.concatenate([[len(history)], history, ordered]).astype("<i8").tobytes()
    key = int.from_bytes(hashlib.sha256(said).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key)).permutation(ordered)

"""A-LLMRec's second stage (arXiv 2404.11343, section 4.2): a frozen language model reads users and items as soft tokens.

Candidates are ranked by the log-likelihood of their titles after the prompt, so that every one has a score; the paper lets the
model write one title and looks for it, which `generate` gives too. The prompt runs once, and its keys and values serve all
of its candidates, which run side by side: each sees the prompt and its own tokens only. Candidates that the prompt does not
name compete with all titles there could be, common words first; so what counts is how much likelier the user makes a title
(pointwise mutual information; Holtzman et al. 2021, arXiv 2104.08315).

Batches, the side of padding and the order of candidates change only how sums are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from udfs.allmrec_examples import AllmrecError
from udfs.allmrec_projections import Projections
from udfs.allmrec_prompt import Prompt, PromptOptions, Prompts
from udfs.model_files import ModelError
from udfs.sequences import Ints, Sequences
from udfs.text_encoder import batches, padded
from udfs.vectors import Matrix


@dataclass(frozen=True)
class Catalogue:
    """What a reader knows of items 0 .. I - 1: how to ask about them, and their joint vectors [I, joint] on its device."""

    prompts: Prompts
    joint: torch.Tensor


class Reader:
    """A frozen causal language model, and `projections` (trained by udfs/allmrec_reader_training.py), None before they exist.

    width: of the token embeddings; embeddings: [vocabulary, width], of all tokens.
    """

    def __init__(
        self,
        directory: Path | str,
        projections: Projections | None = None,
        *,
        batch_tokens: int = 8192,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        padding_side: Literal["left", "right"] = "left",
    ) -> None:
        """Load the model of `directory` (see `udfs.model_files.find_model`), in `dtype`; the projections stay float32.

        Args:
            batch_tokens: tokens of a batch outside of training: prompts with their candidates' titles, padding included.
            padding_side: left, and all answers end at the same place, so that fewest positions go through the model's head; the
                result does not depend on it (beyond rounding).

        Raises:
            ModelError: the files cannot be loaded, or are no causal language model with its head, or it takes no positions.
            AllmrecError: the projections are of another width.
        """
        safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directory, **safe)
            self.model, facts = AutoModelForCausalLM.from_pretrained(
                directory, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **safe
            )
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            raise ModelError(
                f"the model in {directory} cannot be loaded as a causal language model: {error}"
            ) from error
        if facts["missing_keys"]:
            raise ModelError(
                f"the model in {directory} is no whole causal language model: it lacks {sorted(facts['missing_keys'])}"
            )
        if "position_ids" not in signature(self.model.forward).parameters:
            raise ModelError(
                f"the model in {directory} takes no positions ({self.model.config.model_type}): choose another"
            )
        self._window: int | None = _window(self.model.config.get_text_config())
        self.model.requires_grad_(False).eval().to(device)
        self.embeddings: torch.Tensor = self.model.get_input_embeddings().weight
        self.width: int = self.embeddings.shape[1]
        if projections is not None and projections.config.tokens != self.width:
            raise AllmrecError(
                f"the projections write tokens of width {projections.config.tokens}, the model in {directory} reads "
                f"{self.width}: use the language model that they were trained with, or train them again"
            )
        self.projections = projections.to(device) if projections is not None else None
        self.batch_tokens, self.device, self.padding_side = batch_tokens, device, padding_side

    def catalogue(self, titles: list[str], joint: Matrix, options: PromptOptions | None = None) -> Catalogue:
        """Items for the other methods.

        Args:
            titles: I of them. joint: [I, joint] (`udfs.allmrec_alignment.Alignment.joint`).

        Raises:
            AllmrecError: they differ in number.
        """
        if len(titles) != len(joint):
            raise AllmrecError(
                f"{len(titles)} titles for {len(joint)} items: there must be one each, perhaps an empty one"
            )
        vectors = torch.from_numpy(np.array(joint, np.float32)).to(self.device)
        return Catalogue(Prompts(self.tokenizer, titles, options or PromptOptions()), vectors)

    def loss(self, catalogue: Catalogue, users: Matrix, histories: Sequences, candidates: Ints) -> torch.Tensor:
        """-mean log P(token | prompt, tokens before) over the tokens of the true titles, with the end of each answer.

        Args:
            users: x_u [n, d]. histories: of the n users. candidates: [n, C], the true item first.

        Raises:
            AllmrecError: a prompt has more tokens than the model reads.
        """
        found = self._likelihoods(catalogue, users, histories, candidates, candidates[:, 0])
        return -torch.cat(found).mean()

    @torch.no_grad()
    def score(
        self,
        catalogue: Catalogue,
        users: Matrix,
        histories: Sequences,
        candidates: Ints,
        *,
        normalise: bool = True,
        share_prefix: bool = True,
    ) -> Matrix:
        """The log-likelihood of each candidate's title and its end, [n, C] float32; where the prompt does not name the candidates,
        less what it is when nothing is known of the user.

        Args:
            users, candidates: as in `loss`, in any order of a row.
            normalise: divided by the number of tokens, so that long titles are not at a disadvantage; otherwise the sum,
                under which the title that the model would most likely write comes first.
            share_prefix: False runs prompt and title together for each candidate: the same, slower. So does a model with sliding
                windows whose prompts are longer than these: what titles see side by side is then more than a mask can say.

        Raises:
            AllmrecError: a prompt has more tokens than the model reads.
        """
        found = np.empty(candidates.shape, np.float32)
        prompts = self._prompts(catalogue, histories, candidates)
        answer = max((len(catalogue.prompts.answer(item)) for item in np.unique(candidates).tolist()), default=0)
        longest = answer + max((len(prompt.tokens) for prompt in prompts), default=0)
        if share_prefix and (self._window is None or longest <= self._window):
            found = self._sums(catalogue, users, prompts, candidates)
        else:
            for row, column in np.ndindex(candidates.shape):
                one = np.array([row])
                item = candidates[one, column]
                own = self._likelihoods(catalogue, users[one], histories.take(one), candidates[one], item)[0]
                found[row, column] = own.sum()
        if not catalogue.prompts.options.candidates:
            found -= self._of_nobody(catalogue, candidates)
        if normalise:
            found /= np.vectorize(lambda item: len(catalogue.prompts.answer(item)), otypes=[np.float32])(candidates)
        return found

    @torch.no_grad()
    def generate(self, catalogue: Catalogue, users: Matrix, histories: Sequences, candidates: Ints) -> list[str]:
        """What the model writes for each user, token by token the likeliest one, up to the end of an answer: n strings.

        It need not be a candidate's title. Arguments as in `score`.
        """
        prompts, end = self._prompts(catalogue, histories, candidates), catalogue.prompts.end
        most = catalogue.prompts.options.title_tokens + len(end)
        stop = [end[-1], *_list(self.model.generation_config.eos_token_id)]
        found = [""] * len(prompts)
        self._check(max((len(prompt.tokens) + most for prompt in prompts), default=0))
        for rows in batches([len(prompt.tokens) + most for prompt in prompts], self.batch_tokens):
            asked = [prompts[row] for row in rows]
            ids, mask = padded([prompt.tokens for prompt in asked], self.device, "left")
            written = self.model.generate(
                inputs_embeds=self._embedded(catalogue, users[rows], asked, ids, "left"),
                attention_mask=mask,
                max_new_tokens=most,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=stop[0],
            )
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                found[row] = text.strip().split("\n")[0].strip()
        return found

    def _sums(self, catalogue: Catalogue, users: Matrix, prompts: list[Prompt], candidates: Ints) -> Matrix:
        """log P of each candidate's title and its end, [n, C], after n prompts."""
        found = np.empty(candidates.shape, np.float32)
        answers = [[catalogue.prompts.answer(item) for item in row] for row in candidates.tolist()]
        lengths = [
            len(prompt.tokens) + sum(len(answer) - 1 for answer in row)
            for prompt, row in zip(prompts, answers, strict=True)
        ]
        for rows in batches(lengths, self.batch_tokens):
            asked, own = [prompts[row] for row in rows], [answers[row] for row in rows]
            found[rows] = self._side_by_side(catalogue, users[rows], asked, own)
        return found

    def _of_nobody(self, catalogue: Catalogue, candidates: Ints) -> Matrix:
        """The same when nothing is known of the user: each title is asked for once."""
        items, at = np.unique(candidates, return_inverse=True)
        width = candidates.shape[1]
        rows = np.resize(items, (-(-len(items) // width), width))  # the last ones filled up with the first
        prompts = [catalogue.prompts.nobody()] * len(rows)
        found = self._sums(catalogue, np.zeros((len(rows), 1), np.float32), prompts, rows)
        return found.ravel()[at].reshape(candidates.shape)

    def _prompts(self, catalogue: Catalogue, histories: Sequences, candidates: Ints) -> list[Prompt]:
        made = []
        for row, own in enumerate(candidates):
            begin, end = histories.indptr[row : row + 2]
            made.append(catalogue.prompts.prompt(histories.items[begin:end], own))
        return made

    def _embedded(
        self,
        catalogue: Catalogue,
        users: Matrix,
        prompts: list[Prompt],
        ids: torch.Tensor,
        side: Literal["left", "right"],
        ends: list[int] | None = None,
    ) -> torch.Tensor:
        """Token embeddings [n, T, width] of `ids` [n, T], with the soft tokens at their places.

        Args:
            ends: tokens of each row, if more than its prompt's.
        """
        if self.projections is None:
            raise AllmrecError("this reader has no projections yet: train them (udfs/allmrec_reader_training.py)")
        lengths = ends or [len(prompt.tokens) for prompt in prompts]
        shift = [ids.shape[1] - length if side == "left" else 0 for length in lengths]
        embedded = self.model.get_input_embeddings()(ids)
        of_users = [(row, shift[row] + p.user, row) for row, p in enumerate(prompts) if p.user >= 0]
        of_items = [
            (row, shift[row] + place, item)
            for row, p in enumerate(prompts)
            for place, item in zip(p.places, p.items, strict=True)
        ]
        x = torch.from_numpy(np.array(users, np.float32)).to(self.device)
        for where, vectors, project in (
            (of_users, x, self.projections.users),
            (of_items, catalogue.joint, self.projections.items),
        ):
            if where:
                row, place, number = torch.tensor(where, device=self.device).T
                # An item that stands in several prompts is projected once.
                different, at = number.unique(return_inverse=True)
                soft = project(vectors[different])[at]
                embedded = embedded.index_put((row, place), soft.to(embedded.dtype))
        return embedded

    def _likelihoods(
        self, catalogue: Catalogue, users: Matrix, histories: Sequences, candidates: Ints, items: Ints
    ) -> list[torch.Tensor]:
        """log P of each token of the answers `items` [n], float32, one tensor an answer; with gradients."""
        prompts = self._prompts(catalogue, histories, candidates)
        answers = [catalogue.prompts.answer(item) for item in items.tolist()]
        # What follows an answer's last token is not asked.
        rows = [prompt.tokens + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
        self._check(max(map(len, rows)))
        ids, mask = padded(rows, self.device, self.padding_side)
        ends = [len(row) for row in rows]
        embedded = self._embedded(catalogue, users, prompts, ids, self.padding_side, ends)
        begins = [
            ids.shape[1] - len(answer) if self.padding_side == "left" else end - len(answer)
            for end, answer in zip(ends, answers, strict=True)
        ]
        first = min(begins)
        logits = self.model(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=ids.shape[1] - first,
        ).logits
        found = []
        for row, (begin, answer) in enumerate(zip(begins, answers, strict=True)):
            own = logits[row, begin - first : begin - first + len(answer)].float()
            found.append(-F.cross_entropy(own, torch.tensor(answer, device=self.device), reduction="none"))
        return found

    def _side_by_side(
        self, catalogue: Catalogue, users: Matrix, prompts: list[Prompt], answers: list[list[list[int]]]
    ) -> Matrix:
        """The sums of log P over each answer's tokens, [n, C]: `answers` are of n prompts, C each."""
        # Of every answer all but its last token is read, the answers of a prompt one behind the other.
        rows = [[token for answer in own for token in answer[:-1]] for own in answers]
        number = [[nth for nth, answer in enumerate(own) for _ in answer[:-1]] for own in answers]
        within = [[place for answer in own for place in range(len(answer) - 1)] for own in answers]
        longest = max(len(p.tokens) + max(map(len, own)) for p, own in zip(prompts, answers, strict=True))
        self._check(longest)
        ids, mask = padded([prompt.tokens for prompt in prompts], self.device, self.padding_side)
        length = mask.sum(1)
        shortest = int(length.min())
        read = self.model(
            inputs_embeds=self._embedded(catalogue, users, prompts, ids, self.padding_side),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1 if self.padding_side == "left" else ids.shape[1] - shortest + 1,
        )
        last = torch.zeros_like(length) if self.padding_side == "left" else length - shortest
        first = read.logits[torch.arange(len(prompts), device=self.device), last].float().log_softmax(1)
        own_ids, own = padded(rows, self.device)
        which, place = padded(number, self.device)[0], padded(within, self.device)[0]
        same = (which[:, :, None] == which[:, None, :]) & (own[:, None, :] == 1)
        before = place[:, :, None] >= place[:, None, :]
        seen = torch.cat([(mask == 1)[:, None, :].expand(-1, own.shape[1], -1), same & before], 2)
        # Added to the scores of attention, which every implementation of it takes.
        lowest = torch.finfo(self.model.dtype).min
        barred = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device).masked_fill(~seen, lowest)
        logits = self.model(
            input_ids=own_ids,
            attention_mask=barred[:, None],
            position_ids=length[:, None] + place,
            past_key_values=read.past_key_values,
            use_cache=True,
        ).logits
        found = []
        for row, of_row in enumerate(answers):
            targets = torch.tensor([token for answer in of_row for token in answer[1:]], device=self.device)
            opening = torch.tensor([answer[0] for answer in of_row], device=self.device)
            sums = first[row, opening]
            follow = -F.cross_entropy(logits[row, : len(targets)].float(), targets, reduction="none")
            found.append(sums.index_add(0, which[row, : len(targets)], follow))
        return torch.stack(found).cpu().numpy()

    def _check(self, tokens: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and tokens > limit:
            raise AllmrecError(
                f"a prompt with its answer has {tokens} tokens, the model reads {limit}: lower history or title_tokens of the "
                "prompt, or give fewer candidates"
            )


def _window(config: Any) -> int | None:
    """How many tokens back the layers with the shortest sight see; None: all of them see all."""
    layers = getattr(config, "layer_types", None)
    if layers is not None and not any(kind != "full_attention" for kind in layers):
        return None
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)


def _list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)

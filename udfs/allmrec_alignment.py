"""A-LLMRec's first stage (arXiv 2404.11343, section 4.1): a joint space of items' CF vectors E_i and text vectors Q_i.

e_i = f_I^enc(E_i) and q_i = f_T^enc(Q_i) are to match, and each is decoded again: f_I^dec into the CF space, f_T^dec into the
text's. A cold item has no E_i: q_i stands in place of e_i, and f_I^dec(q_i) is its CF vector.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from udfs import module_files
from udfs.allmrec_examples import AllmrecError
from udfs.devices import forked
from udfs.vectors import Matrix

# Rows that are encoded or decoded at a time, outside of training.
_ROWS = 8192


@dataclass(frozen=True)
class Config:
    """Shapes and kind of the networks.

    Shallow, as in the paper's released code: one hidden layer, the joint space itself, f^enc(x) = sigmoid(W x + b) and f^dec
    linear. Deep: `hidden` layers with ReLU and dropout on the way to the joint space, and back in reverse; four of them with
    a dropout of .2 are a published variant, whose widths are not known.
    """

    dimension: int  # of E_i
    width: int  # of Q_i
    joint: int = 128
    deep: bool = False
    hidden: tuple[int, ...] = (512, 384, 256, 192)  # deep only
    dropout: float = 0.2  # deep only


@dataclass(frozen=True)
class Weights:
    """L = match + alpha * L_item + beta * L_text + recommendation * L_rec (+ text_recommendation * L_rec of f_I^dec(q_i)).

    match: "mse", the paper's; "infonce"; or "none". The paper's beta is .5 or .2 by data set. temperature: of InfoNCE.
    text_recommendation is not in the paper: it teaches f_I^dec(q_i) itself to rank, which otherwise only follows from matching.
    """

    match: Literal["mse", "infonce", "none"] = "mse"
    alpha: float = 0.5
    beta: float = 0.5
    recommendation: float = 1.0
    text_recommendation: float = 0.0
    temperature: float = 0.07


class Alignment(nn.Module):
    """The four networks. Between them and the outside vectors are standardised (`standardise`; at first they are not)."""

    item_offset: torch.Tensor
    item_scale: torch.Tensor
    text_offset: torch.Tensor
    text_scale: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.item_encoder, self.item_decoder = _networks(config.dimension, config)
        self.text_encoder, self.text_decoder = _networks(config.width, config)
        self.register_buffer("item_offset", torch.zeros(config.dimension))
        self.register_buffer("item_scale", torch.ones(()))
        self.register_buffer("text_offset", torch.zeros(config.width))
        self.register_buffer("text_scale", torch.ones(config.width))

    def standardise(self, items: Matrix, texts: Matrix) -> None:
        """Centre and scale what the networks read and write by E [n, d] and Q [n, D] of warm items.

        CF vectors share one scale, so that inner products with users keep their meaning; texts have one a dimension.
        """
        item_offset, text_offset, text_scale = items.mean(0), texts.mean(0), texts.std(0)
        item_scale = float(np.sqrt(np.mean((items - item_offset) ** 2)))
        self.item_offset.copy_(torch.from_numpy(item_offset.astype(np.float32)))
        self.item_scale.fill_(item_scale if item_scale > 1e-6 else 1.0)
        self.text_offset.copy_(torch.from_numpy(text_offset.astype(np.float32)))
        # A dimension that never varies carries nothing: its standardised value stays 0, not 0 / 0.
        self.text_scale.copy_(torch.from_numpy(np.where(text_scale > 1e-6, text_scale, 1.0).astype(np.float32)))

    def items(self, items: torch.Tensor) -> torch.Tensor:
        """e [n, joint] of CF vectors [n, d]."""
        return self.item_encoder((items - self.item_offset) / self.item_scale)

    def texts(self, texts: torch.Tensor) -> torch.Tensor:
        """q [n, joint] of text vectors [n, D]."""
        return self.text_encoder((texts - self.text_offset) / self.text_scale)

    def to_items(self, joint: torch.Tensor) -> torch.Tensor:
        """f_I^dec: [n, joint] -> the CF space, [n, d]."""
        return self.item_decoder(joint) * self.item_scale + self.item_offset

    def to_texts(self, joint: torch.Tensor) -> torch.Tensor:
        """f_T^dec: [n, joint] -> the space of text vectors, [n, D]."""
        return self.text_decoder(joint) * self.text_scale + self.text_offset

    @torch.no_grad()
    def joint(self, items: Matrix, texts: Matrix, text_side: NDArray[np.bool_]) -> Matrix:
        """[I, joint] float32: q_i where text_side [I], otherwise e_i.

        Args:
            items: E [I, d]; rows where text_side is true are not read. texts: Q [I, D].

        Raises:
            AllmrecError: the vectors have other widths than the networks.
        """
        self._check(items, texts)
        self.eval()
        found = np.empty((len(text_side), self.config.joint), np.float32)
        for side, vectors, encode in ((True, texts, self.texts), (False, items, self.items)):
            rows = np.flatnonzero(text_side == side)
            for start in range(0, len(rows), _ROWS):
                part = rows[start : start + _ROWS]
                found[part] = encode(self._tensor(vectors[part])).cpu().numpy()
        return found

    @torch.no_grad()
    def decoded(self, joint: Matrix) -> Matrix:
        """The CF vectors f_I^dec of joint vectors, [n, joint] -> [n, d] float32: of q_i, what a cold item's CF vector would be."""
        self.eval()
        parts = [self.to_items(self._tensor(joint[s : s + _ROWS])).cpu().numpy() for s in range(0, len(joint), _ROWS)]
        return np.concatenate(parts) if parts else np.zeros((0, self.config.dimension), np.float32)

    def _tensor(self, vectors: Matrix) -> torch.Tensor:
        return torch.from_numpy(np.array(vectors, np.float32)).to(self.item_offset.device)

    def _check(self, items: Matrix, texts: Matrix) -> None:
        expected, found = (self.config.dimension, self.config.width), (items.shape[1], texts.shape[1])
        if found != expected or len(items) != len(texts):
            raise AllmrecError(
                f"the alignment joins CF vectors of {expected[0]} and text vectors of {expected[1]} dimensions, one each an "
                f"item; these are {items.shape} and {texts.shape}: use the models that it was trained on, or train again"
            )


def losses(
    model: Alignment,
    weights: Weights,
    users: torch.Tensor,
    items: torch.Tensor,
    texts: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The parts of a batch's loss, scalars not yet weighted: match, item, text, recommendation, text_recommendation.

    A part with weight 0 is left out. Squared errors are means over the dimensions, in the standardised space, and the sum of
    the mean over positives and that over negatives, as the released code has them. Its mean in place of the inner product of
    L_rec is not taken: CF was trained on inner products.

    Args:
        users: x_u [B, d]. items: E [m, d]; texts: Q [m, D] of different items. positive, negative: [B], rows of them.
    """

    def both(error: torch.Tensor) -> torch.Tensor:
        return error[positive].mean() + error[negative].mean()

    def recommendation(decoded: torch.Tensor) -> torch.Tensor:
        right, wrong = ((users * decoded[rows]).sum(1) for rows in (positive, negative))
        return -(F.logsigmoid(right) + F.logsigmoid(-wrong)).mean()

    e, q = model.items(items), model.texts(texts)
    found: dict[str, torch.Tensor] = {}
    if weights.match == "mse":
        found["match"] = both((e - q).square().mean(1))
    elif weights.match == "infonce":
        found["match"] = infonce(e, q, weights.temperature)
    if weights.alpha or weights.recommendation:
        decoded = model.to_items(e)
        if weights.alpha:
            found["item"] = both(((items - decoded) / model.item_scale).square().mean(1))
        if weights.recommendation:
            found["recommendation"] = recommendation(decoded)
    if weights.beta:
        # What is reconstructed is no variable, even while the sentence encoder is trained.
        found["text"] = both(((texts.detach() - model.to_texts(q)) / model.text_scale).square().mean(1))
    if weights.text_recommendation:
        found["text_recommendation"] = recommendation(model.to_items(q))
    return found


def total(parts: dict[str, torch.Tensor], weights: Weights) -> torch.Tensor:
    """L of `losses`."""
    factors = {
        "match": 1.0,
        "item": weights.alpha,
        "text": weights.beta,
        "recommendation": weights.recommendation,
        "text_recommendation": weights.text_recommendation,
    }
    return torch.stack([factors[name] * part for name, part in parts.items()]).sum()


def infonce(e: torch.Tensor, q: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mean of both directions' cross-entropy of an item's own other side among the batch's, by cosine / temperature.

    Radford et al. 2021 (CLIP). e, q: [m, joint] of different items.
    """
    logits = F.normalize(e, dim=1) @ F.normalize(q, dim=1).T / temperature
    own = torch.arange(len(e), device=e.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def random_joint(items: int, joint: int, seed: int) -> Matrix:
    """[items, joint] standard normal float32: what stands in place of joint vectors in the paper's ablation."""
    return np.random.Generator(np.random.Philox(seed)).normal(size=(items, joint)).astype(np.float32)


def build(config: Config, seed: int) -> Alignment:
    """Untrained networks; `seed` decides their start."""
    with forked():
        torch.manual_seed(seed)
        return Alignment(config)


def dump(model: Alignment) -> dict[str, bytes]:
    """The model as files: model.safetensors and config.json."""
    return module_files.dump(model, asdict(model.config))


def load(files: dict[str, bytes]) -> Alignment:
    """The model of `dump`'s files, in evaluation mode; raises AllmrecError if they are not what they should be."""

    def made(fields: dict[str, object]) -> Alignment:
        return Alignment(Config(**{**fields, "hidden": tuple(fields["hidden"])}))  # type: ignore[arg-type]

    return module_files.load(files, made, "A-LLMRec alignment", AllmrecError)


def _networks(width: int, config: Config) -> tuple[nn.Module, nn.Module]:
    """Encoder from `width` to the joint space, and the decoder back."""
    if not config.deep:
        return nn.Sequential(nn.Linear(width, config.joint), nn.Sigmoid()), nn.Linear(config.joint, width)
    there = (width, *config.hidden, config.joint)
    return _deep(there, config.dropout), _deep(there[::-1], config.dropout)


def _deep(widths: tuple[int, ...], dropout: float) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))

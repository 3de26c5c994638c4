"""FilterLLM (arXiv 2502.16924): an item's text to a distribution over all users, p(u | c) = softmax_u(s * (g . z_u + b_u)).

g is the mapped hidden state of the language model, z_u a row of the user vocabulary, b_u an optional bias, and s a scale that
calibrates p on warm items that training did not see. By default the space is as narrow as the CF embeddings that the
vocabulary starts from, so that a vocabulary of millions of users fits; in the paper it is as wide as the hidden state
(`widened` carries CF embeddings there).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from schemas.errors import ColdRefreshError
from udfs import module_files


class FilterLLMError(ColdRefreshError):
    """A saved FilterLLM is not what its configuration says, or does not fit the texts it is given."""


@dataclass(frozen=True)
class Config:
    """Shapes and kind of a model."""

    width: int  # of the hidden states
    dimension: int  # of g and of the user vocabulary
    users: int
    mapper: Literal["linear", "linear_relu", "mlp"] = "mlp"
    # Not the settings' own: those are 2048, 0.5 and 1.
    hidden: int = 512  # of the mlp
    dropout: float = 0.1  # of the mlp
    noise: float = 0.0  # standard deviation, on the standardised hidden state; mlp, in training only
    user_bias: bool = True


class FilterLLM(nn.Module):
    """Mapper and user vocabulary; the language model itself is outside.

    Parameters: mapper.*, vocabulary [users, dimension], bias [users] if config.user_bias. Buffers: mean, std [width] (the
    hidden states are standardised with them), scale [] (1 until calibrated). All float32.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        if config.mapper == "linear":
            self.mapper: nn.Module = nn.Linear(config.width, config.dimension)
        elif config.mapper == "linear_relu":
            self.mapper = nn.Sequential(nn.Linear(config.width, config.dimension), nn.ReLU())
        else:
            self.mapper = nn.Sequential(
                nn.Linear(config.width, config.hidden),
                nn.ReLU(),
                nn.Dropout(config.dropout),
                nn.Linear(config.hidden, config.dimension),
            )
        self.vocabulary = nn.Parameter(torch.zeros(config.users, config.dimension))
        self.bias = nn.Parameter(torch.zeros(config.users)) if config.user_bias else None
        self.register_buffer("mean", torch.zeros(config.width))
        self.register_buffer("std", torch.ones(config.width))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """g [B, dimension] of hidden states [B, width], before the scale."""
        hidden = (hidden - self.mean) / self.std
        if self.training and self.config.mapper == "mlp" and self.config.noise > 0:
            hidden = hidden + self.config.noise * torch.randn_like(hidden)
        return self.mapper(hidden)

    @torch.inference_mode()
    def queries(self, hidden: np.ndarray) -> np.ndarray:
        """s * g [n, dimension] float32 of hidden states [n, width]: its product with `keys` is the calibrated logit.

        Raises:
            FilterLLMError: the hidden states have another width.
        """
        if hidden.ndim != 2 or hidden.shape[1] != self.config.width:
            raise FilterLLMError(
                f"the model was trained on text embeddings of width {self.config.width}, these have shape "
                f"{hidden.shape}: encode the texts with the language model that it was trained with"
            )
        self.eval()
        device = self.vocabulary.device
        blocks = [
            self(torch.from_numpy(np.array(hidden[start : start + 4096], np.float32)).to(device)) * self.scale
            for start in range(0, len(hidden), 4096)
        ]
        return torch.cat(blocks).cpu().numpy() if blocks else np.zeros((0, self.config.dimension), np.float32)

    def keys(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The user vocabulary [users, dimension] and s * bias [users] (None without a bias), float32."""
        bias = None if self.bias is None else (self.bias.detach() * self.scale).cpu().numpy()
        return self.vocabulary.detach().cpu().numpy(), bias


def widened(vectors: np.ndarray, width: int, seed: int) -> np.ndarray:
    """[n, width] float32: `vectors` [n, d] times a matrix [d, width] with orthonormal rows, drawn from `seed`.

    Inner products are kept, so CF's users and items, carried by the same seed, fit each other as before.

    Raises:
        FilterLLMError: d is more than `width`.
    """
    dimension = vectors.shape[1]
    if dimension > width:
        raise FilterLLMError(
            f"vectors of {dimension} dimensions cannot be carried into a language model's {width} without loss: "
            "lower cf.dimension, or set filterllm.vocabulary: cf"
        )
    normal = np.random.Generator(np.random.Philox(key=[seed, 0])).normal(size=(width, dimension))
    return (vectors @ np.linalg.qr(normal)[0].T).astype(np.float32)


def dump(model: FilterLLM) -> dict[str, bytes]:
    """The model as files: model.safetensors and config.json."""
    return module_files.dump(model, asdict(model.config))


def load(files: dict[str, bytes]) -> FilterLLM:
    """The model of `dump`'s files, in evaluation mode; raises FilterLLMError if they are not what they should be."""
    return module_files.load(files, lambda fields: FilterLLM(Config(**fields)), "FilterLLM", FilterLLMError)

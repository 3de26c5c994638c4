"""The rows of the A-LLMRec benchmark: what ranks the candidates, as changes to the options of the whole method."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

#: random; popularity; the CF model's own score; text: mean of the history's texts . the candidate's (`nearest`: the highest of
#: them instead); stage 1: x_u . f_I^dec of the joint vector; with text: both (`nearest`: beside the mean); reader: the language
#: model's likelihood of the title; reader with stage 1: all of them. Several are weighed by the validation items.
Ranker = Literal[
    "random", "popularity", "backbone", "text", "stage 1", "stage 1 with text", "reader", "reader with stage 1"
]


@dataclass(frozen=True)
class Options:
    """A-LLMRec and its training, as the paper has it but for sizes. A row changes the first part, the command the second."""

    ranker: Ranker = "reader"
    backbone: str = "sasrec"  # or gru4rec, nextitnet, ncf, lightgcn, als_cg
    match: Literal["mse", "infonce", "none"] = "mse"
    reconstruction: bool = True
    recommendation: float = 1.0
    text_recommendation: float = 0.0
    deep: bool = False
    tuned: bool = True  # the sentence encoder is trained along, by LoRA
    user: bool = True  # soft tokens of the prompt
    items: bool = True
    candidates: bool = True  # the prompt names them
    random_joint: bool = False
    nearest: bool = False  # how like the most similar text of the history a candidate's is

    test_users: int = 1000  # of a column at most; 0: all
    cold_users: int = 1000  # left out of training; at most a tenth of the users
    train_users: int = 4000  # whom the second stage learns from, at most; 0: all
    epochs: int = 5  # of the second stage
    weigh_users: int = 256  # whose validation items weigh the second stage beside others, at most; 0: 2,000
    tuned_users: int = 4000  # whom the sentence encoder learns from, at most; 0: all
    tuned_epochs: int = 1
    alignment_epochs: int = 10
    cf_epochs: int = 200
    cf_patience: int = 20
    dimension: int = 50  # of the CF space
    history: int = 10  # titles in a prompt
    title_tokens: int = 24
    learning_rate: float = 1e-4  # of the second stage
    model: str = "smollm2"
    text_model: str = "minilm"
    dtype: str = "float32"  # of the language model
    device: str = "cpu"


#: What the command can change: an option of its own each.
SIZES = (
    "test_users", "cold_users", "train_users", "epochs", "weigh_users", "tuned_users", "tuned_epochs", "alignment_epochs",
    "cf_epochs", "cf_patience", "dimension", "history", "title_tokens", "learning_rate", "model", "text_model", "dtype", "device",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """changes: to fields of Options."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)

    def options(self, base: Options) -> Options:
        return replace(base, **self.changes)


_BACKBONES = {
    "SASRec": "sasrec",
    "GRU4Rec": "gru4rec",
    "NextItNet": "nextitnet",
    "NCF": "ncf",
    "LightGCN": "lightgcn",
    "ALS": "als_cg",
}

#: Of the first stage.
_ABLATIONS: dict[str, dict[str, Any]] = {
    "without match": {"match": "none"},
    "without reconstruction": {"reconstruction": False},
    "without recommendation loss": {"recommendation": 0.0},
    "InfoNCE": {"match": "infonce"},
    "deep alignment": {"deep": True},
}
_STAGE_1: dict[str, Any] = {"ranker": "stage 1", "tuned": False}
# text_recommendation, which the paper does not have: f_I^dec(q_i) itself learns to rank.
_TAUGHT: dict[str, Any] = {"tuned": False, "text_recommendation": 1.0, "text_model": "minilm+words"}
_OTHERS = {name: kind for name, kind in _BACKBONES.items() if kind != "sasrec"}

ROWS = (
    Row("random", {"ranker": "random"}),
    Row("popularity", {"ranker": "popularity"}),
    *(Row(name, {"ranker": "backbone", "backbone": kind}) for name, kind in _BACKBONES.items()),
    Row("LLM only", {"ranker": "reader", "user": False, "items": False}),
    Row("LLM only, candidates not named", {"ranker": "reader", "user": False, "items": False, "candidates": False}),
    Row("text encoder only", {"ranker": "text"}),
    Row("text encoder only, MiniLM + words", {"ranker": "text", "text_model": "minilm+words"}),
    Row("text encoder only, MiniLM + words, nearest", {"ranker": "text", "text_model": "minilm+words", "nearest": True}),
    Row("stage 1 only", {"ranker": "stage 1"}),
    Row("stage 1 only, frozen encoder", _STAGE_1),
    *(Row(f"stage 1 only, frozen encoder, {name}", {**_STAGE_1, **changes}) for name, changes in _ABLATIONS.items()),
    *(Row(f"stage 1 only, frozen encoder, on {name}", {**_STAGE_1, "backbone": kind}) for name, kind in _OTHERS.items()),
    Row("stage 1 only, frozen encoder, text taught to rank", {"ranker": "stage 1", "tuned": False, "text_recommendation": 1.0}),
    Row("stage 1 only, MiniLM + words, text taught to rank", {"ranker": "stage 1", **_TAUGHT}),
    # What the second stage has to beat: no language model reads the titles, their vectors are compared.
    Row("stage 1 with text, MiniLM + words, text taught to rank", {"ranker": "stage 1 with text", **_TAUGHT}),
    Row(
        "stage 1 with text, MiniLM + words, nearest, text taught to rank",
        {"ranker": "stage 1 with text", "nearest": True, **_TAUGHT},
    ),
    Row(
        "LLM only, candidates not named, beside stage 1 with text, MiniLM + words",
        {"ranker": "reader with stage 1", "user": False, "items": False, "candidates": False, **_TAUGHT},
    ),
    Row("A-LLMRec"),
    Row("A-LLMRec beside stage 1 with text, MiniLM + words", {"ranker": "reader with stage 1", **_TAUGHT}),
    Row("candidates not named", {"candidates": False}),
    # A prompt of a sixth of the tokens: what can be trained without a GPU.
    Row("candidates not named, MiniLM + words, text taught to rank", {"candidates": False, **_TAUGHT}),
    Row(
        "candidates not named, beside stage 1 with text, MiniLM + words",
        {"ranker": "reader with stage 1", "candidates": False, **_TAUGHT},
    ),
    *(Row(name, changes) for name, changes in _ABLATIONS.items()),
    Row("frozen encoder", {"tuned": False}),
    Row("without user", {"user": False}),
    Row("without joint item", {"items": False}),
    Row("random joint item", {"random_joint": True}),
    Row("text taught to rank", {"text_recommendation": 1.0}),
    *(Row(f"A-LLMRec on {name}", {"backbone": kind}) for name, kind in _OTHERS.items()),
)  # fmt: skip

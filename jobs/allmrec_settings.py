"""Section `allmrec` of the settings: what a person may choose about A-LLMRec (arXiv 2404.11343).

Defaults are the paper's, except: the backbone is the night's own space (the paper's: sasrec) and the language model SmolLM2
(OPT-6.7B); every event of a history is an example (its last item), at most so many of them; the sentence encoder, which is that of
`text`, is frozen (with allmrec.alignment.lora it is trained along, by adapters); which epoch is kept is decided by held-out
items' texts; and likelihood and nearness are weighed (by likelihood alone).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jobs.settings_section import Lora, Section


class AllmrecBackbone(Section):
    """The CF model that represents users by their histories (ncf: by their ids), if it is not the night's space."""

    dimension: int = Field(50, ge=2)
    max_length: int = Field(50, ge=1, description="items of a history that are read, the last ones; not ncf")
    epochs: int = Field(200, ge=1)
    patience: int = Field(20, ge=1)
    learning_rate: float = Field(1e-3, gt=0)


class AllmrecAlignment(Lora):
    """A-LLMRec's first stage: CF and text joined (udfs/allmrec_alignment.py); lora: the sentence encoder is trained along."""

    joint: int = Field(128, ge=1, description="dimensions of the joint space")
    deep: bool = Field(False, description="several hidden layers (a published variant) in place of one")
    hidden: tuple[int, ...] = Field((512, 384, 256, 192), description="deep: their widths")
    dropout: float = Field(0.2, ge=0, lt=1, description="deep")
    match: Literal["mse", "infonce", "none"] = "mse"
    alpha: float = Field(0.5, ge=0, description="weight of the items' reconstruction")
    beta: float = Field(0.5, ge=0, description="weight of the texts' reconstruction")
    recommendation: float = Field(1.0, ge=0, description="weight of the recommendation loss")
    text_recommendation: float = Field(0.0, ge=0, description="the same of the text side; not in the paper")
    temperature: float = Field(0.07, gt=0, description="infonce")
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(32, ge=1)
    epochs: int = Field(10, ge=1)
    patience: int = Field(10, ge=1)
    examples: int = Field(100_000, ge=1, description="(user, item) pairs to learn from, at most")
    validation_share: float = Field(
        0.05, gt=0, lt=1, description="warm items held out: they decide which epoch is kept"
    )
    stop_by: Literal["text", "loss"] = Field(
        "text", description="text: by NDCG@10 of the held-out items' decoded texts"
    )

    @model_validator(mode="after")
    def _learns(self) -> AllmrecAlignment:
        if self.match == "none" and not (self.alpha or self.beta or self.recommendation or self.text_recommendation):
            raise ValueError("no loss is left: set match, alpha, beta, recommendation or text_recommendation")
        return self


class AllmrecReader(Section):
    """A-LLMRec's second stage: a frozen causal language model ranks titles (udfs/allmrec_reader.py)."""

    model: str = Field("smollm2", description="a causal language model: smollm2, a directory or a hub id")
    sha256: str | None = Field(None, description="what model.safetensors must hash to; known for smollm2")
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_tokens: int = Field(8192, ge=64, description="tokens a batch: prompts with their candidates' titles, padded")
    domain: Literal["items", "movies", "games"] = Field("items", description="what the prompt calls them")
    history: int = Field(10, ge=1, description="titles of a user's history in the prompt, the last ones")
    title_tokens: int = Field(24, ge=1, description="of a title no more are read")
    user: bool = Field(True, description="the user's vector is in the prompt")
    items: bool = Field(True, description="the items' joint vectors are in the prompt")
    candidates: bool = Field(
        True,
        description="the prompt names the candidates; false (not in the paper): it does not, and a title is ranked by how much "
        "likelier the user makes it",
    )
    normalise: bool = Field(True, description="titles are ranked by likelihood a token, otherwise by their whole one")
    negatives: int = Field(19, ge=1, description="training: candidates beside the true one")
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(4, ge=1)
    epochs: int = Field(5, ge=1)
    examples: int = Field(1024, ge=1, description="users to learn from, at most (the paper's few-shot: 256, 128)")
    weigh_users: int = Field(
        128,
        ge=0,
        description="recommend: held-out users by whom likelihood and retrieval score are weighed, at most; 0: likelihood alone",
    )
    shard_users: int = Field(64, ge=1, description="users a shard: what a killed run can lose")


class Allmrec(Section):
    """A-LLMRec (arXiv 2404.11343): refresh.cold=allmrec takes its alignment, `python -m jobs.recommend` all of it."""

    backbone: Literal["space", "sasrec", "gru4rec", "nextitnet", "ncf"] = Field(
        "space",
        description="recommend: whose users and items the reader is told of; space: the published vectors, which cf.model made: "
        "that is the way to als, lightgcn and the others of it. (refresh.cold=allmrec always places items in the night's space)",
    )
    model: AllmrecBackbone = AllmrecBackbone()
    alignment: AllmrecAlignment = AllmrecAlignment()
    reader: AllmrecReader = AllmrecReader()
    retrain_days: int = Field(
        8, ge=1, description="a backbone so many days old is trained anew, and what is built on it"
    )

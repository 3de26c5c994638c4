"""What a run may choose: a YAML file of conf/, checked into frozen typed settings.

An unknown key is an error that names it. `key=value` overrides (`--set text.max_tokens=32`) are applied before the check.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from jobs.allmrec_settings import Allmrec
from jobs.settings_checks import check
from jobs.settings_section import Lora, told
from jobs.settings_section import Section as _Section
from schemas.errors import ColdRefreshError
from udfs.cleaning import template


class SettingsError(ColdRefreshError):
    """The settings cannot be used: the message names the file, the key and what was expected."""


class InputTable(_Section):
    """Where an input table is: a name in the lake or a URI of its own, and how its columns are called there."""

    table: str
    columns: dict[str, str] = Field(default_factory=dict, description="our name -> the table's name")


class Inputs(_Section):
    interactions: InputTable = InputTable(table="interactions")
    items: InputTable = InputTable(table="items")


class Split(_Section):
    """A given split: pairs of other parts than `train` are held out of training and of everything computed from it."""

    table: str = "split"
    train: tuple[str, ...] = ("train",)


class Snapshot(_Section):
    warm_interactions: int = Field(1, ge=1, description="an item with fewer users than this is cold")
    k_core_users: int = Field(0, ge=0, description="drop users with fewer items, again and again with k_core_items")
    k_core_items: int = Field(0, ge=0)
    window_days: int | None = Field(None, ge=1, description="read only events of this many days before the run date")
    max_text_bytes: int = Field(1_000_000, ge=1, description="an item with more text than this is rejected")
    split: Split | None = None


class Text(_Section):
    """The language model and how it is run over item texts."""

    model: str = Field("minilm", description="minilm, smollm2, a directory or a hub id; words: none, hashed words")
    also: tuple[str, ...] = Field((), description="further models (or words): their vectors stand beside the first's")
    sha256: str | None = Field(None, description="what model's safetensors must hash to; known for minilm and smollm2")
    pooling: Literal["auto", "mean", "last_token", "cls"] = Field("auto", description="of model and also alike")
    prompt: str = Field(
        "{content}", description="{title}, {text} and {content} (title and text) stand for the item's fields"
    )
    max_tokens: int = Field(128, ge=4)
    batch_tokens: int = Field(8192, ge=64, description="padded tokens a batch")
    dtype: Literal["float32", "bfloat16"] = "float32"
    shard_texts: int = Field(2048, ge=1, description="texts a shard: what a killed run can lose")

    @field_validator("prompt")
    @classmethod
    def _names_fields(cls, prompt: str) -> str:
        template(prompt)
        return prompt


class LLMInit(_Section):
    """How text embeddings become the start of a CF model (udfs/llm_init.py)."""

    select: Literal["random", "uniform", "variance", "pca", "full"] = Field(
        "pca", description="how a text's vector is made as narrow as the space; variance is the paper's choice"
    )
    replacement: bool = Field(False, description="random: with replacement, as in the released code")
    popular_share: float = Field(
        0.2, gt=0, le=1, description="variance: over this share of the items, the most popular"
    )
    scale: Literal["raw", "unit_variance", "unit_norm"] = Field(
        "unit_variance", description="raw is the paper's; the others are as large as cf.init_std makes a random start"
    )


class Cf(_Section):
    model: Literal["als", "als_cg", "bpr", "lightgcn", "sgl", "sgcl"] = Field(
        "als", description="als runs on Spark; als_cg is its twin in torch, for 256 dimensions and more on one machine"
    )
    init: Literal["random", "llminit"] = Field("random", description="llminit: bpr, lightgcn, sgl and sgcl")
    init_std: float = Field(0.1, gt=0, description="bpr, lightgcn, sgl, sgcl: size of a random start's entries")
    llminit: LLMInit = LLMInit()
    dimension: int = Field(64, ge=2)
    epochs: int = Field(15, ge=1, description="iterations of als and als_cg, epochs of the others")
    regularization: float = Field(0.05, gt=0, description="ALS and fold-in: lambda, times a row's number of pairs")
    alpha: float = Field(40.0, gt=0, description="ALS and fold-in: confidence is 1 + alpha * weight (Hu et al. 2008)")
    learning_rate: float = Field(1e-2, gt=0, description="bpr, lightgcn, sgl, sgcl")
    weight_decay: float = Field(1e-4, ge=0, description="bpr, lightgcn, sgl, sgcl: L2 of the embeddings of each triple")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="torch models; auto: a GPU if there is one")
    batch_size: int = Field(8192, ge=1, description="bpr, lightgcn, sgl, sgcl: pairs a step")
    layers: int = Field(2, ge=0, description="lightgcn, sgl, sgcl")
    temperature: float = Field(0.2, gt=0, description="sgl, sgcl: of their cosines")
    contrast_weight: float = Field(0.05, ge=0, description="sgl: of InfoNCE beside BPR")
    edge_dropout: float = Field(0.1, ge=0, lt=1, description="sgl: edges left out of a view")
    negatives: Literal["item", "user"] = Field(
        "item",
        description="bpr, lightgcn, sgl: user sets users against each other for an item, as FilterLLM's guider does",
    )
    binary: bool = Field(True, description="every pair has weight 1; otherwise log(1 + sum of weights)")
    blocks: int = Field(
        2, ge=1, description="als: parallel blocks, about as many as cores; 1 makes it deterministic to the last bit"
    )
    retrain_days: int = Field(
        9,
        ge=1,
        description="a space this old is trained anew by the night; two days more than the week of dags/cold_refresh_training.py",
    )


class FilterLLM(Lora):
    epochs: int = Field(20, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    batch_size: int = Field(256, ge=1)
    guiding: float = Field(1.0, ge=0, description="lambda: weight of the behaviour-guiding loss")
    mapper: Literal["linear", "linear_relu", "mlp"] = "mlp"
    hidden: int = Field(2048, ge=1, description="width of the mlp mapper")
    dropout: float = Field(0.5, ge=0, lt=1, description="mlp mapper")
    noise: float = Field(1.0, ge=0, description="train-time Gaussian noise on the hidden state (mlp mapper)")
    user_init: Literal["cf", "random"] = "cf"
    user_bias: bool = True
    vocabulary: Literal["cf", "llm"] = Field(
        "cf", description="the users' vectors are as wide as CF's, or (the paper's way) as the language model's"
    )
    softmax: Literal["full", "sampled"] = Field(
        "full", description="sampled: for more users than a training step can go through"
    )
    samples: int = Field(8192, ge=1, description="sampled softmax: users drawn a step")
    proposal: Literal["uniform", "popularity"] = Field("uniform", description="sampled softmax: how they are drawn")
    max_users: int = Field(1000, ge=1, description="training users an item, at most")
    validation_share: float = Field(0.05, gt=0, lt=1, description="warm items held out to stop early and to calibrate")
    patience: int = Field(4, ge=1)
    stop_by: Literal["nll", "ndcg"] = Field("nll", description="which epoch is best, on the items held out")
    vocabulary_chunk: int = Field(65536, ge=1, description="users whose logits exist at a time")
    word_ridge: float = Field(
        1.0, gt=0, description="of the linear map from words to the space that is kept with the model (refresh.words)"
    )
    retrain_days: int = Field(9, ge=1, description="the same for the model")


class Sampling(_Section):
    k: int = Field(20, ge=1, description="users a cold item")
    draw: Literal["top_k", "sampled"] = Field(
        "top_k", description="top_k: the K most probable users; sampled: K drawn without replacement"
    )
    temperature: float = Field(1.0, gt=0, description="sampled: above 1 flattens the distribution that is drawn from")
    user_tile: int = Field(16384, ge=1, description="users scored at a time")
    shard_items: int = Field(4096, ge=1)


class Refresh(_Section):
    method: Literal["fold_in", "retrain"] = Field(
        "fold_in",
        description="fold_in: in closed form, the space stays; retrain: CF on real and sampled pairs, each night a new space",
    )
    cold: Literal["sampled", "llminit", "allmrec"] = Field(
        "sampled",
        description="where cold items' vectors come from: FilterLLM's sampled users, (cf.init=llminit) their text's start, or "
        "their text through A-LLMRec's first stage (allmrec.alignment); the rest of this section is for the first",
    )
    users: int | None = Field(None, ge=1, description="how many of the K users the refresh uses; all by default")
    by_probability: bool = Field(True, description="weigh the users by their probability; otherwise each counts as one")
    interactions: float = Field(
        15.0, gt=0, description="fold_in by probability: how many interactions an item's users stand for together"
    )
    scale: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="fold_in: length of the vector of an item without real interactions, times this; auto: as much as makes "
        "warm items that FilterLLM has not seen as long as CF made them",
    )
    words: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "auto",
        description="fold_in: share of the vector that a linear map makes of the text's words, beside the one folded in from "
        "the sampled users; auto: what is best for warm items that neither has seen; 0: none",
    )


class Gates(_Section):
    norm_low: float = Field(0.02, gt=0, description="a vector's norm, at least, as a share of the warm items' median")
    norm_high: float = Field(10.0, gt=0)
    norm_mostly: float = Field(
        0.99, gt=0, le=1, description="share within the band: of all vectors, and of those whose source is not cf"
    )
    procrustes_residual: float = Field(
        0.9,
        gt=0,
        description="of a new space to the one published before; 0 is alike but for rotation and scale, 1 unlike",
    )
    rejected_share: float = Field(0.5, gt=0, le=1, description="bad rows of an input, duplicates among them, at most")
    kept_share: float = Field(
        0.5,
        ge=0,
        description="used rows of an input, and items with a text, at least, as a share of the night's that was published "
        "before; 0: any",
    )
    stale_days: int | None = Field(
        None,
        ge=1,
        description="days between the newest event used and the midnight of the run date, at most; any by default",
    )

    @model_validator(mode="after")
    def _band(self) -> Gates:
        if self.norm_low >= self.norm_high:
            raise ValueError(f"norm_low ({self.norm_low}) must be below norm_high ({self.norm_high})")
        return self


class Evaluate(_Section):
    protocol: Literal["none", "temporal", "random_item"] = Field(
        "temporal", description="temporal: by what happens after the run date; random_item: by the table split; none"
    )
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((20,), min_length=1)
    horizon_days: int = Field(
        60, ge=1, description="temporal: truth is what happens within so many days from the run date"
    )
    part: Literal["val", "test"] = Field("test", description="random_item")
    bootstrap: int = Field(200, ge=0)
    max_users: int = Field(
        100_000, ge=1, description="users of the truth who are asked about cold items, and about warm; drawn if more"
    )
    normalize_by_item: bool = Field(True, description="distribution: rank by log p(u|i) rather than by the raw logit")


class RayCluster(_Section):
    """How the workers run. Only another number of training_workers gives another model (of FilterLLM), as another seed does."""

    address: str | None = Field(
        None, description="of a running cluster (host:port or auto); without one it is started here"
    )
    actors: int = Field(1, ge=1, description="workers that encode and score at a time")
    cpus_per_actor: float = Field(1.0, gt=0)
    gpus_per_actor: float = Field(0.0, ge=0, description="above 0 they compute on the GPU")
    training_workers: int = Field(
        0,
        ge=0,
        description="Ray Train's workers that train FilterLLM (0: the driver trains it); each draws dropout and noise of its own. "
        "Above 0 each part of A-LLMRec is trained on one such worker, too; several would not share that work",
    )


class Spark(_Section):
    """How Spark runs; nothing here changes a result."""

    master: str | None = Field(None, description="local[*] unless spark-submit says otherwise")
    conf: dict[str, str] = Field(
        default_factory=dict, description="on one machine the driver's page is off unless spark.ui.enabled is true here"
    )


# Into what pieces work is cut, on what device it runs, and what only checks: no other result comes of these (`Settings.digest`).
_DECIDES_NOTHING = {
    "text": ("shard_texts", "sha256"),
    "cf": ("device", "retrain_days"),
    "filterllm": ("vocabulary_chunk", "retrain_days"),
    "sampling": ("shard_items", "user_tile"),
    "gates": ("kept_share", "stale_days"),
}


class Settings(_Section):
    lake: str = Field(description="a folder or an s3://, gs://, abfss:// URI")
    storage_options: dict[str, str] = Field(
        default_factory=dict,
        description="how delta-rs commits, such as timeout; where the store is and who asks stays in the environment",
    )
    seed: int = Field(7, ge=0)
    inputs: Inputs = Inputs()
    snapshot: Snapshot = Snapshot()
    text: Text = Text()
    cf: Cf = Cf()
    filterllm: FilterLLM = FilterLLM()
    sampling: Sampling = Sampling()
    refresh: Refresh = Refresh()
    allmrec: Allmrec = Allmrec()
    gates: Gates = Gates()
    evaluate: Evaluate = Evaluate()
    ray: RayCluster = RayCluster()
    spark: Spark = Spark()
    keep_runs: int = Field(
        7,
        ge=1,
        description="runs whose staged files and index are kept; a snapshot stays for evaluate.horizon_days (temporal)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        check(self)
        return self

    def digest(self, *sections: str) -> str:
        """Hash (16 hex digits) of the settings that decide results; of `sections` only, if named.

        Where the lake is, how and on what workers run, into what pieces work is cut, which file a model is to be, and how much
        an input may have shrunk or aged is left out: so a run that ended for want of memory goes on with smaller pieces. (What
        a batch of tokens holds counts where a language model is trained along: dropout falls by batches.) So is `retrain_days`,
        which says when to train and not what comes of it. Of section allmrec a night reads the alignment only, and that for
        refresh.cold=allmrec: otherwise nothing there makes another night.
        """
        body = self.model_dump(mode="json", exclude={"lake", "storage_options", "ray", "spark", "keep_runs"})
        for section, names in _DECIDES_NOTHING.items():
            for name in names:
                body[section].pop(name)
        if not (self.filterllm.lora or self.allmrec.alignment.lora):
            body["text"].pop("batch_tokens")
        if not sections:
            allmrec = body.pop("allmrec")
            if self.refresh.cold == "allmrec":
                body["allmrec.alignment"] = allmrec["alignment"]
        else:
            body = {name: body[name] for name in sections}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]

    def training(self) -> Settings:
        """These settings, with a new space and model for the run date unless there are some of the same data."""
        return self.model_copy(
            update={
                "cf": self.cf.model_copy(update={"retrain_days": 0}),
                "filterllm": self.filterllm.model_copy(update={"retrain_days": 0}),
            }
        )


def _set(body: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise SettingsError(f"--set {override!r}: expected key=value, such as text.max_tokens=32")
    *parents, last = key.split(".")
    for parent in parents:
        body = body.setdefault(parent, {})
        if not isinstance(body, dict):
            raise SettingsError(f"--set {override!r}: {parent} is not a section")
    try:
        body[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {override!r}: {value!r} is not YAML, quote it: {error}") from None


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Settings:
    """The settings of the YAML file `path` with `overrides` ("section.key=value") applied.

    Raises:
        SettingsError: no such file, no YAML mapping, an unknown key, or a value out of its range.
    """
    try:
        body = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"no settings file {path}; conf/ holds {sorted(p.name for p in Path('conf').glob('*.yaml'))}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"{path} is no readable YAML file: {error}") from error
    if not isinstance(body, dict):
        raise SettingsError(f"{path} holds no mapping of settings")
    for override in overrides:
        _set(body, override)
    try:
        return Settings.model_validate(body)
    except ValidationError as error:
        lines = [f"  {told(e, Settings)}" for e in error.errors()]
        # Their names only: a value that is not the wrong one may be a secret.
        given = f" with {', '.join('--set ' + one.partition('=')[0] for one in overrides)}" if overrides else ""
        raise SettingsError(
            "\n".join([f"{path}{given}: settings that cannot be used:", *dict.fromkeys(lines)])
        ) from None

"""The rows of the quality benchmark: what each changes in the data set's conf, as --set takes it.

A row is a night of its own (stages snapshot to refresh) with these settings, so whoever wants it gives the same settings.
Rows of one data set share the lake: what two have in common (text embeddings, space, model) is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """overrides: key=value. encoders: names of `--encoder` that must be given for the row."""

    name: str
    overrides: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ()


ROWS = (
    Row("FilterLLM"),
    Row("start: random vocabulary", ("filterllm.user_init=random",)),
    Row("lambda 0", ("filterllm.guiding=0",)),
    Row("lambda 0.1", ("filterllm.guiding=0.1",)),
    Row("lambda 10", ("filterllm.guiding=10",)),
    Row("no user bias", ("filterllm.user_bias=false",)),
    Row("mapper: linear", ("filterllm.mapper=linear",)),
    Row("mapper: linear + ReLU (the paper's)", ("filterllm.mapper=linear_relu",)),
    # Guiding is a mean over the dimensions: as many times its weight as the width is larger (384 for 256).
    Row("vocabulary at the LLM's width", ("filterllm.vocabulary=llm", "filterllm.guiding=1.5")),
    Row("sampled softmax, uniform", ("filterllm.softmax=sampled", "filterllm.samples=1024")),
    Row(
        "sampled softmax, popularity",
        ("filterllm.softmax=sampled", "filterllm.samples=1024", "filterllm.proposal=popularity"),
    ),
    Row("users drawn, not the top", ("sampling.draw=sampled",)),
    Row("K = 20", ("sampling.k=20",)),
    Row("cold items placed by users alone", ("refresh.words=0",)),
    Row("cold items placed by users and words", ("refresh.words=auto",)),
    Row("refresh: retrained on the union", ("refresh.method=retrain",)),
    Row("CF: Spark ALS, 64 dimensions", ("cf.model=als", "cf.dimension=64")),
    Row(
        "CF: LightGCN against users (the guider)",
        ("cf.model=lightgcn", "cf.negatives=user", "cf.dimension=64", "cf.epochs=40"),
    ),
    Row("CF: LightGCN", ("cf.model=lightgcn", "cf.dimension=64", "cf.epochs=40")),
    Row(
        "CF: LightGCN from LLMInit",
        ("cf.model=lightgcn", "cf.dimension=64", "cf.epochs=40", "cf.init=llminit", "cf.llminit.select=variance"),
    ),
    Row(
        "CF: LightGCN from LLMInit, PCA",
        ("cf.model=lightgcn", "cf.dimension=64", "cf.epochs=40", "cf.init=llminit", "cf.llminit.select=pca"),
    ),
    Row(
        "cold items where LLMInit puts them",
        (
            "cf.model=lightgcn",
            "cf.dimension=64",
            "cf.epochs=40",
            "cf.init=llminit",
            "cf.llminit.select=variance",
            "refresh.cold=llminit",
        ),
    ),
    Row("cold items where A-LLMRec's alignment puts them", ("refresh.cold=allmrec",)),
    Row("LoRA", ("filterllm.lora=true", "filterllm.epochs=6", "text.also=[]")),
    Row("SmolLM2, last token", ("text.model=smollm2", "text.also=[]")),
    Row("SmolLM2, mean", ("text.model=smollm2", "text.pooling=mean", "text.also=[]")),
    Row("MiniLM alone", ("text.model=minilm", "text.also=[]")),
    Row("MiniLM + words", ("text.model=minilm", "text.also=[words]")),
    Row("words alone, no language model", ("text.model=words", "text.also=[]")),
    Row("mpnet", ("text.model={mpnet}", "text.also=[]"), ("mpnet",)),
    Row("mpnet + words", ("text.model={mpnet}", "text.also=[words]"), ("mpnet",)),
    Row("MiniLM + mpnet", ("text.also=['{mpnet}']",), ("mpnet",)),
    Row("MiniLM + mpnet, users and words", ("text.also=['{mpnet}']", "refresh.words=auto"), ("mpnet",)),
)


def overrides(row: Row, encoders: dict[str, str]) -> list[str] | None:
    """The row's settings with the encoders' folders in their places; None if one is not given."""
    if any(name not in encoders for name in row.encoders):
        return None
    return [override.format_map(encoders) if row.encoders else override for override in row.overrides]

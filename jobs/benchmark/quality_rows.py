"""The rows of the quality benchmark: what each changes in the data set's conf, as --set takes it.

A row is a night of its own (stages snapshot to refresh) with these settings, so whoever wants it gives the same settings.
Rows of one data set share the lake: what two have in common (text embeddings, space, model) is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping

from jobs.benchmark.backbones import MODELS, STARTS, TRAINING
from jobs.benchmark.choice import Row

# A space that is not the conf's own: how long cold vectors must be there is measured, since the conf's factor is for its own.
_OTHER_SPACE = ("refresh.scale=auto",)
_GRAPH = ("cf.dimension=64", "cf.epochs=40", *TRAINING, *_OTHER_SPACE)
_LIGHTGCN = MODELS["LightGCN"]
_FROM = {
    "random": "",
    "LLMInit random": " from LLMInit, random",
    "LLMInit uniform": " from LLMInit, uniform",
    "LLMInit variance": " from LLMInit",
    "LLMInit PCA": " from LLMInit, PCA",
}


def _on(name: str, model: tuple[str, ...], *overrides: str) -> Row:
    """A row on the space of a CF model of MODELS; what that one is tuned to may be changed, which it is may not."""
    which, *tuned = model
    return Row(name, (which, *overrides), (*_GRAPH, *tuned))


ROWS = (
    Row("FilterLLM"),
    Row("start: random vocabulary", ("filterllm.user_init=random",)),
    Row("lambda 0", ("filterllm.guiding=0",)),
    Row("lambda 0.1", ("filterllm.guiding=0.1",)),
    Row("lambda 10", ("filterllm.guiding=10",)),
    Row("no user bias", ("filterllm.user_bias=false",)),
    Row("mapper: linear", ("filterllm.mapper=linear",)),
    Row("mapper: linear + ReLU (the paper's)", ("filterllm.mapper=linear_relu",)),
    # Guiding is a mean over the dimensions: as many times its weight as the width is larger, here MiniLM's 384 for 256. Where
    # words stand beside it (1,408), --set filterllm.guiding=5.5 is the same.
    Row("vocabulary at the LLM's width", ("filterllm.vocabulary=llm",), ("filterllm.guiding=1.5",)),
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
    Row(
        "refresh: retrained on the union, 20 users that count alike (the paper's)",
        ("refresh.method=retrain", "sampling.k=20", "refresh.by_probability=false"),
    ),
    Row("CF: Spark ALS, 64 dimensions", ("cf.model=als", "cf.dimension=64", *STARTS["random"]), _OTHER_SPACE),
    _on("CF: LightGCN against users (the guider)", _LIGHTGCN, "cf.negatives=user", *STARTS["random"]),
    *(
        _on(f"CF: {name}{_FROM[start]}", model, *overrides)
        for name, model in MODELS.items()
        for start, overrides in STARTS.items()
    ),
    _on("cold items where LLMInit puts them", _LIGHTGCN, *STARTS["LLMInit variance"], "refresh.cold=llminit"),
    Row("cold items where A-LLMRec's alignment puts them", ("refresh.cold=allmrec",)),
    Row("frozen, six epochs", ("filterllm.epochs=6", "text.also=[]")),  # what LoRA alone changes
    Row("LoRA", ("filterllm.lora=true", "filterllm.epochs=6", "text.also=[]")),
    Row("SmolLM2, last token", ("text.model=smollm2", "text.also=[]")),
    Row("SmolLM2, mean", ("text.model=smollm2", "text.pooling=mean", "text.also=[]")),
    Row("MiniLM alone", ("text.model=minilm", "text.also=[]")),
    Row("MiniLM + words", ("text.model=minilm", "text.also=[words]")),
    Row("words alone, no language model", ("text.model=words", "text.also=[]")),
)


def rows(encoders: Mapping[str, str]) -> list[Row]:
    """All of them, with further text encoders: name -> folder."""
    return [
        *ROWS,
        *(
            row
            for name, folder in encoders.items()
            for row in (
                Row(name, (f"text.model={folder}", "text.also=[]")),
                Row(f"{name} + words", (f"text.model={folder}", "text.also=[words]")),
                Row(f"MiniLM + {name}", (f"text.also=['{folder}']",)),
                Row(f"MiniLM + {name}, users and words", (f"text.also=['{folder}']", "refresh.words=auto")),
            )
        ),
    ]

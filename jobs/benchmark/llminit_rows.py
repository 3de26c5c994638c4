"""The rows of the LLMInit benchmark: a CF model, its start, and for some another text encoder, as --set takes them."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.benchmark.backbones import MODELS, STARTS, TRAINING

#: What all rows share: the paper's dimension, and what LightGCN was tuned to; other models' own is in MODELS.
BASE = ("cf.dimension=128", "cf.epochs=300", *TRAINING, "text.also=[]")


@dataclass(frozen=True)
class Row:
    """overrides: key=value. encoders: names of `--encoder` that must be given for the row."""

    name: str
    overrides: tuple[str, ...]
    encoders: tuple[str, ...] = ()

    def at(self, dimension: int) -> Row:
        """The row in a space of so many dimensions."""
        return Row(f"{self.name}, d = {dimension}", (*self.overrides, f"cf.dimension={dimension}"), self.encoders)


_LLM = "cf.init=llminit"
_VARIANCE = "cf.llminit.select=variance"
_STARTS = {
    **STARTS,
    # MiniLM's width.
    "LLMInit full": (_LLM, "cf.llminit.select=full", "cf.dimension=384"),
    "random, d = 384": ("cf.dimension=384",),
}
_ENCODERS = {
    "mpnet": (("text.model={mpnet}",), ("mpnet",)),
    "SmolLM2, last token": (("text.model=smollm2",), ()),
    "SmolLM2, mean": (("text.model=smollm2", "text.pooling=mean"), ()),
}

ROWS = (
    *(
        Row(f"{name}, {start}", (*model, *overrides))
        for name, model in MODELS.items()
        for start, overrides in _STARTS.items()
    ),
    *(
        Row(
            f"LightGCN, LLMInit {select}, {scale}",
            ("cf.model=lightgcn", _LLM, f"cf.llminit.select={select}", f"cf.llminit.scale={scale}"),
        )
        for select in ("variance", "pca")
        for scale in ("raw", "unit_norm")
    ),
    *(
        Row(f"LightGCN, LLMInit variance, {name}", ("cf.model=lightgcn", _LLM, _VARIANCE, *overrides), encoders)
        for name, (overrides, encoders) in _ENCODERS.items()
    ),
    *(
        Row(f"LightGCN, LLMInit PCA, {name}", ("cf.model=lightgcn", _LLM, "cf.llminit.select=pca", text), encoders)
        for name, text, encoders in (
            ("MiniLM + words", "text.also=[words]", ()),
            ("mpnet", "text.model={mpnet}", ("mpnet",)),
        )
    ),
)

#: The starts whose quality is measured by dimension.
BY_DIMENSION = (
    Row("random", ("cf.model=lightgcn",)),
    Row("LLMInit variance", ("cf.model=lightgcn", _LLM, _VARIANCE)),
    Row("LLMInit PCA", ("cf.model=lightgcn", _LLM, "cf.llminit.select=pca")),
)

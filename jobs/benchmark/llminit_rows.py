"""The rows of the LLMInit benchmark: a CF model, its start, and for some another text encoder, as --set takes them."""

from __future__ import annotations

from dataclasses import dataclass

#: What all rows share: the paper's dimension and layers; batches as large as a CPU likes them. The rest was tuned on the
#: validation items of Amazon Beauty.
BASE = (
    "cf.dimension=128",
    "cf.epochs=300",
    "cf.batch_size=2048",
    "cf.learning_rate=0.005",
    "cf.weight_decay=0.0001",
    "cf.layers=2",
    "text.also=[]",
)


@dataclass(frozen=True)
class Row:
    """overrides: key=value. encoders: names of `--encoder` that must be given for the row."""

    name: str
    overrides: tuple[str, ...]
    encoders: tuple[str, ...] = ()

    def at(self, dimension: int) -> Row:
        """The row in a space of so many dimensions."""
        return Row(f"{self.name}, d = {dimension}", (*self.overrides, f"cf.dimension={dimension}"), self.encoders)


_MODELS = {"BPR": "bpr", "LightGCN": "lightgcn", "SGL": "sgl", "SGCL": "sgcl"}
_LLM = "cf.init=llminit"
_VARIANCE = "cf.llminit.select=variance"
_STARTS = {
    "random": (),
    "LLMInit random": (_LLM, "cf.llminit.select=random"),
    "LLMInit uniform": (_LLM, "cf.llminit.select=uniform"),
    "LLMInit variance": (_LLM, _VARIANCE),
    "LLMInit PCA": (_LLM, "cf.llminit.select=pca"),
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
        Row(f"{model}, {start}", (f"cf.model={name}", *overrides))
        for model, name in _MODELS.items()
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

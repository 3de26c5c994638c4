"""The rows of the LLMInit benchmark: a CF model, its start, and for some another text encoder, as --set takes them."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.benchmark.backbones import MODELS, STARTS, TRAINING
from jobs.benchmark.choice import Row

#: What all rows share: the paper's dimension, and what LightGCN was tuned to; other models' own is in MODELS.
BASE = ("cf.dimension=128", "cf.epochs=300", *TRAINING, "text.also=[]")


def _row(name: str, model: tuple[str, ...], *overrides: str) -> Row:
    """Of a CF model of MODELS."""
    which, *tuned = model
    return Row(name, (which, *overrides), (*BASE, *tuned))


_LIGHTGCN = MODELS["LightGCN"]
_VARIANCE, _PCA = STARTS["LLMInit variance"], STARTS["LLMInit PCA"]
# As wide as the encoder's texts are, whatever cf.dimension is.
_FULL = ("cf.init=llminit", "cf.llminit.select=full")
_WIDE = (*STARTS["random"], "cf.dimension=384")

_ROWS = (
    *(
        _row(f"{name}, {start}", model, *overrides)
        for name, model in MODELS.items()
        for start, overrides in (STARTS | {"LLMInit full": _FULL, "random, d = 384": _WIDE}).items()
    ),
    *(
        _row(f"LightGCN, LLMInit {select}, {scale}", _LIGHTGCN, *start, f"cf.llminit.scale={scale}")
        for select, start in (("variance", _VARIANCE), ("pca", _PCA))
        for scale in ("raw", "unit_norm")
    ),
    *(
        _row(f"LightGCN, LLMInit {select}, SmolLM2, {name}", _LIGHTGCN, *start, "text.model=smollm2", *pooling)
        for select, start in (("variance", _VARIANCE), ("PCA", _PCA))
        for name, pooling in (("last token", ()), ("mean", ("text.pooling=mean",)))
    ),
    _row("LightGCN, LLMInit PCA, MiniLM + words", _LIGHTGCN, *_PCA, "text.also=[words]"),
)


def rows(encoders: Mapping[str, str]) -> list[Row]:
    """All of them, with further text encoders: name -> folder."""
    starts = {"LLMInit variance": _VARIANCE, "LLMInit PCA": _PCA, "LLMInit full": _FULL}
    return [
        *_ROWS,
        *(
            _row(f"LightGCN, {start}, {encoder}", _LIGHTGCN, *overrides, f"text.model={folder}")
            for encoder, folder in encoders.items()
            for start, overrides in starts.items()
        ),
    ]


def by_dimension(encoders: Mapping[str, str]) -> list[Row]:
    """The starts whose quality is measured by dimension, of LightGCN."""
    return [
        *(_row(start, _LIGHTGCN, *overrides) for start, overrides in STARTS.items()),
        *(
            _row(f"{start}, {encoder}", _LIGHTGCN, *STARTS[start], f"text.model={folder}")
            for encoder, folder in encoders.items()
            for start in ("LLMInit variance", "LLMInit PCA")
        ),
    ]

"""CF models of the benchmarks with what each trains well with, and where they begin, as --set takes them."""

from __future__ import annotations

#: Tuned with LightGCN on the validation items of Amazon Beauty; batches are as large as a CPU likes them.
TRAINING = ("cf.batch_size=2048", "cf.learning_rate=0.005", "cf.weight_decay=0.0001", "cf.layers=2")

#: First which model it is, then what it has in place of TRAINING's.
MODELS = {
    "BPR": ("cf.model=bpr", "cf.weight_decay=0.03"),
    "LightGCN": ("cf.model=lightgcn",),
    "SGL": ("cf.model=sgl",),
    "SGCL": ("cf.model=sgcl", "cf.learning_rate=0.001"),
}

STARTS = {
    "random": ("cf.init=random", "cf.llminit={}"),  # whatever a conf says
    **{
        f"LLMInit {name}": ("cf.init=llminit", f"cf.llminit.select={select}")
        for name, select in (("random", "random"), ("uniform", "uniform"), ("variance", "variance"), ("PCA", "pca"))
    },
}

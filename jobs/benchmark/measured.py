"""A night of a benchmark: run up to its refreshed embeddings, and measured on the test and the validation part."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from jobs import settings as conf
from jobs import truth
from jobs.benchmark.datasets import DataSet
from jobs.evaluate import Systems
from jobs.run import Run, execute, open_run
from jobs.truth import Catalog, Truth
from udfs.ranking_metrics import Scorer, Task, per_user
from udfs.scorers import dot_scorer

_STAGES = ("snapshot", "text_embeddings", "cf", "filterllm_train", "filterllm_score", "refresh")


@dataclass(frozen=True)
class Measured:
    """A night whose refreshed embeddings are staged, with the tasks of its test and validation parts."""

    run: Run
    catalog: Catalog
    parts: dict[str, Truth]
    systems: Systems

    def metrics(self, part: str, scorers: dict[str, Scorer | None]) -> dict[str, float]:
        """Of one scorer a split (None: the split has no figure), at each K of evaluate.k."""
        found: dict[str, float] = {}
        for split, task in self.parts[part].tasks.items():
            scorer = scorers.get(split)
            if scorer is not None:
                values = per_user(scorer, task, self.run.settings.evaluate.k)
                found |= {f"{split} {name}": float(value.mean()) for name, value in values.items()}
        return found

    def published(self, part: str) -> dict[str, float]:
        """The refreshed embeddings, and the distribution on cold items with its calibration error (udfs/reliability.py)."""
        named: dict[str, dict[str, Scorer | None]] = {}
        for split, task in self.parts[part].tasks.items():
            for name, scorer in self.systems.of(split, task):
                if name not in ("published", "distribution"):
                    break  # the floors come after these, and the texts' neighbours take seconds
                named.setdefault(name, {})[split] = scorer
        found = self.metrics(part, named["published"])
        of_cold = self.metrics(part, named.get("distribution", {}))
        curve = self.systems.reliability(self.parts[part].tasks["cold"]) if of_cold else None
        if curve is not None:
            found["calibration error"] = curve.calibration_error
        return found | {f"distribution {name.removeprefix('cold ')}": value for name, value in of_cold.items()}

    def floor(self, part: str, name: str) -> dict[str, float]:
        tasks = self.parts[part].tasks
        return self.metrics(part, {split: dict(self.systems.of(split, task))[name] for split, task in tasks.items()})

    def vectors(self, part: str, cold: np.ndarray | None) -> dict[str, float]:
        """The warm items as they are and other vectors [cold items, d], in the catalog's order; None: cold have none."""
        items = self.systems.items.copy()
        items[self.catalog.cold] = np.nan if cold is None else cold
        users, known = self.systems.users, self.systems.users_known

        def scorer(task: Task) -> Scorer:
            there = self.systems.items_known[task.candidates] | self.catalog.cold[task.candidates]
            vectors = np.where(there[:, None], items[task.candidates], np.float32(np.nan))
            return dot_scorer(users, vectors, task.candidates, known)

        return self.metrics(part, {split: scorer(task) for split, task in self.parts[part].tasks.items()})


def measure(data: DataSet, lake: str, seed: int, given: list[str]) -> Measured:
    """Run the night's stages up to refresh with these overrides, and read the truth."""
    settings = conf.load(data.conf, [*given, f"seed={seed}", f"lake={lake}"])
    run = open_run(settings, data.run_date)
    for name in _STAGES:
        execute(run, name)
    catalog = truth.catalog(run)
    parts = {}
    for part in ("test", "val"):
        if settings.evaluate.protocol != "random_item" and part == "val":
            continue
        evaluate = settings.evaluate.model_copy(update={"part": part})
        parts[part] = truth.read(replace(run, settings=settings.model_copy(update={"evaluate": evaluate})), catalog)
    staged = run.staging("refresh")
    users, items = staged.read("user_embeddings"), staged.read("item_embeddings")
    return Measured(run, catalog, parts, Systems(run, catalog, users, items, run.staging("filterllm_train").facts()))

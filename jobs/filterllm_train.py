"""Stage filterllm_train: the FilterLLM model of the night, an earlier one or one that is trained now.

A model is an artifact (`_artifacts/models/<version>`): model.safetensors and config.json (udfs/filterllm.py), the table
`users` (user_id, in the order of the vocabulary), the tables `words` and `words_without_held_out` (udfs/word_map.py, learnt from
the same items), with LoRA also the adapters (udfs/lora.py). It belongs to one embedding space and one language model, and its
version is a hash of what it was made from. It is trained through Ray Train (udfs/ray_training.py) and saves its state every epoch
under `_artifacts/checkpoints/<version>`: a run that was killed goes on from there and gives the same model.
"""

from __future__ import annotations

import hashlib
import json
from datetime import date
from typing import Any

from jobs import cf, filterllm_fit, training_workers
from jobs.run import Run, log
from jobs.settings import Settings
from jobs.staging import Staging
from udfs import filterllm, module_files, word_map
from udfs.filterllm import FilterLLM
from udfs.word_map import WordMap

_DEFINITION = "3"  # raise it when another model comes from the same settings


def conf_digest(settings: Settings) -> str:
    """Hash of the settings and the seed that decide a model, beside its space and language model."""
    return hashlib.sha256(f"{settings.digest('filterllm', 'text')} {settings.seed}".encode()).hexdigest()[:16]


def kept(run: Run, space_version: str, language_model: str) -> str | None:
    """The model that the night takes up: the newest of the last filterllm.retrain_days days for this space, language model (see
    `text_embeddings.model_version`) and settings. None: it trains one.
    """
    identity, days = _identity(run.settings, space_version, language_model), run.settings.filterllm.retrain_days
    fresh = [v for day, v in _models(run, identity) if (run.run_date - day).days < days]
    return fresh[-1] if fresh else None


def run(run: Run, out: Staging) -> dict[str, Any]:
    """Choose the night's model: the newest of the last filterllm.retrain_days days for this space, language model and
    settings, or train one.

    Returns:
        model_version; space_version; encoder_version (whose text embeddings it reads); trained: whether this run trained
        it; trained_on, users, items, validation_items, best_epoch, validation_nll, validation_ndcg, calibrated_nll,
        scale.

    Raises:
        FilterLLMError: no warm item of the space has a text.
    """
    space_version = run.staging("cf").facts()["space_version"]
    language_model = run.staging("text_embeddings").facts()["model_version"]
    version = kept(run, space_version, language_model)
    if version is not None:
        log(f"[filterllm_train] model {version} is younger than {run.settings.filterllm.retrain_days} days: kept")
    else:
        version = _train(run, _identity(run.settings, space_version, language_model))
    facts = run.artifact("models", version).facts()
    told = ["space_version", "encoder_version", "trained_on", "users", "items", "validation_items", "best_epoch"]
    told += ["validation_nll", "validation_ndcg", "calibrated_nll", "scale"]
    return {
        "model_version": version,
        "trained": facts["run_id"] == run.run_id,
        **{name: facts[name] for name in told},
    }


def load_model(run: Run, version: str) -> FilterLLM:
    """The model `version`.

    Raises:
        jobs.staging.StagingError: it is not there, or not complete.
        FilterLLMError: its files do not fit together.
    """
    artifact = run.artifact("models", version)
    artifact.facts()
    return filterllm.load({name: artifact.read_bytes(name) for name in module_files.FILES})


def load_words(run: Run, version: str, *, held_out: bool = True) -> WordMap | None:
    """The map from words to the space that was learnt with model `version`, from the items that were held out too, or without
    them; None: no text of then holds a word."""
    artifact, name = run.artifact("models", version), "words" if held_out else "words_without_held_out"
    return word_map.from_table(artifact.read(name)) if artifact.facts()[name] else None


def _identity(settings: Settings, space_version: str, language_model: str) -> dict[str, str]:
    """What models that can stand in for each other have in common."""
    return {
        "space_version": space_version,
        "language_model": language_model,
        "conf": conf_digest(settings),
        "definition": _DEFINITION,
    }


def _models(run: Run, identity: dict[str, str]) -> list[tuple[date, str]]:
    """(trained_on, version) of the models of this identity, as `Run.trained` orders them."""
    return [(day, version) for day, version, facts in run.trained("models") if identity.items() <= facts.items()]


def _train(run: Run, identity: dict[str, str]) -> str:
    """Train a model and leave it as an artifact; returns its version."""
    items, shas = filterllm_fit.listed(run, cf.load_space(run, identity["space_version"]))
    content = [*identity.values(), run.staging("snapshot").facts()["training_digest"], items, shas]
    version = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    artifact, checkpoints = run.artifact("models", version), run.artifact("checkpoints", version)
    if artifact.is_complete():
        run.renew("models", version)
    else:
        found = _fit(run, identity, version)
        if not artifact.is_complete():
            dated = {"run_id": run.run_id, "trained_on": run.run_date.isoformat(), "nth": run.nth("models")}
            artifact.complete({**identity, **dated, **found})
    # Not before the model is complete: until then a killed run goes on from them.
    checkpoints.clear()
    return version


def _fit(run: Run, identity: dict[str, str], version: str) -> dict[str, Any]:
    """Train over ray.training_workers workers, or in this process; the model's facts."""
    run, workers = run.anywhere(), run.settings.ray.training_workers
    checkpoints = run.artifact("checkpoints", version)
    # Another number of workers is another training, which goes on with its own states only.
    state = checkpoints.path(f"state-{max(workers, 1)}")
    return training_workers.run(
        filterllm_fit.fit,
        (run, identity, version, state),
        run.settings.ray,
        workers,
        checkpoints,
        lambda line: log(f"[filterllm_train] {line}"),
    )

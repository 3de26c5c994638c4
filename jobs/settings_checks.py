"""Which settings do not go together: what would be refused late, or be without effect where it was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from udfs.cf_model import DRAWS_NEGATIVES, STARTABLE
from udfs.hashed_words import width_of

if TYPE_CHECKING:
    from jobs.settings import Settings


def check(settings: Settings) -> None:
    """Raises ValueError: the message names the settings and the way out."""
    if settings.refresh.users is not None and settings.refresh.users > settings.sampling.k:
        raise ValueError(f"refresh.users ({settings.refresh.users}) is more than sampling.k ({settings.sampling.k})")
    models = (settings.text.model, *settings.text.also)
    if len(set(models)) < len(models):
        raise ValueError(f"text.model and text.also name a model twice: {', '.join(models)}")
    if settings.text.sha256 and width_of(settings.text.model) is not None:
        raise ValueError("text.sha256 is of a language model's file, and text.model words has none")
    tuned = [("filterllm.lora", settings.filterllm.lora), ("allmrec.alignment.lora", settings.allmrec.alignment.lora)]
    for name in (name for name, on in tuned if on):
        if settings.text.also:
            raise ValueError(f"{name} trains one language model: leave text.also empty")
        if width_of(settings.text.model) is not None:
            raise ValueError(f"{name} trains a language model, and text.model words is none")
    if settings.cf.init == "llminit" and settings.cf.model not in STARTABLE:
        raise ValueError(
            f"cf.init llminit needs a cf.model that keeps its start ({', '.join(STARTABLE)}), not {settings.cf.model}"
        )
    if settings.cf.init == "random" and settings.cf.llminit != type(settings.cf.llminit)():
        raise ValueError("cf.llminit says how texts become the start, and cf.init is random: set cf.init llminit")
    if settings.cf.negatives == "user" and settings.cf.model not in DRAWS_NEGATIVES:
        raise ValueError(
            f"cf.negatives user is for {', '.join(DRAWS_NEGATIVES)}; {settings.cf.model} draws no negatives"
        )
    if settings.refresh.cold == "llminit" and settings.cf.init != "llminit":
        raise ValueError("refresh.cold llminit needs cf.init llminit: otherwise texts and space have nothing in common")
    if settings.refresh.cold != "sampled" and settings.refresh.method != "fold_in":
        raise ValueError(
            f"refresh.cold {settings.refresh.cold} places cold items in the night's space, and refresh.method retrain trains "
            "them into another one: set refresh.method fold_in, or refresh.cold sampled"
        )
    aligned = settings.allmrec.alignment
    if aligned.match == "none" and not aligned.text_recommendation and settings.refresh.cold == "allmrec":
        raise ValueError(
            "refresh.cold allmrec needs texts that are tied to CF: set allmrec.alignment.match mse or infonce, or "
            "allmrec.alignment.text_recommendation above 0"
        )
    if (
        not (aligned.alpha or aligned.recommendation or aligned.text_recommendation)
        and settings.refresh.cold == "allmrec"
    ):
        raise ValueError(
            "refresh.cold allmrec needs a decoder into the CF space, and nothing trains it: set allmrec.alignment.alpha, "
            "allmrec.alignment.recommendation or allmrec.alignment.text_recommendation above 0"
        )
    if settings.ray.training_workers > 1 and 0 < settings.ray.gpus_per_actor < 1:
        raise ValueError(
            f"ray.training_workers ({settings.ray.training_workers}) need a whole GPU each: set ray.gpus_per_actor 1, or "
            "ray.training_workers 1"
        )
    if settings.evaluate.protocol == "random_item" and settings.snapshot.split is None:
        raise ValueError("evaluate.protocol random_item needs snapshot.split")

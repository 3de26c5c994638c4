"""A-LLMRec's trained parts in the benchmark: each is trained once for all rows that share it, kept, and gone on with."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
import torch

from jobs.benchmark import allmrec_data
from jobs.benchmark.allmrec_data import Corpus, Division
from jobs.benchmark.allmrec_rows import Options
from jobs.benchmark.kept import Kept
from jobs.benchmark.measure import peak_memory
from jobs.run import log
from udfs import (
    allmrec_alignment,
    allmrec_alignment_training,
    allmrec_projections,
    allmrec_reader_training,
    backbone,
    cf_model,
    hashed_words,
    lora,
    ncf,
    sampled_ranking,
    sequence_training,
)
from udfs.allmrec_prompt import DOMAINS, PromptOptions
from udfs.allmrec_reader import Catalogue, Reader
from udfs.backbone import Backbone, MatrixBackbone
from udfs.cf_inputs import CfParams, Pairs
from udfs.checkpoints import Checkpoints
from udfs.filterllm_items import FrozenTexts
from udfs.fingerprint import fingerprint
from udfs.hashed_words import HashedWords
from udfs.model_files import ModelFiles, find_model
from udfs.text_encoder import TextEncoder
from udfs.vectors import Matrix

# The paper's weight of the texts' reconstruction, by data set; .5 for others.
_BETA = {"amazon-beauty": 0.2, "amazon-toys": 0.2}
_WORDING = {"amazon-games": "games"}
_TEXT_TOKENS = 64
# Adapters of the sentence encoder; users of LightGCN's looks at the validation items are the other models'.
_LORA = {"rank": 8, "alpha": 16, "dropout": 0.05}
_LOOK = 5

Found = TypeVar("Found")


@dataclass(frozen=True)
class Cost:
    """seconds; memory: bytes at the peak."""

    seconds: float = 0.0
    memory: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, max(self.memory, other.memory))


@dataclass(frozen=True)
class Part:
    """files: what was trained, as bytes by name. cost: of it and of what it is built on. key: what it was made from."""

    files: dict[str, bytes]
    cost: Cost
    key: str


def measured(work: Callable[[], Found], device: str) -> tuple[Found, Cost]:
    """What `work` gives, its seconds and its peak memory on `device` beyond what was there before."""
    found: list[tuple[Found, float]] = []

    def timed() -> None:
        begun = time.perf_counter()
        value = work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        found.append((value, time.perf_counter() - begun))

    memory = peak_memory(timed, device)
    return found[0][0], Cost(found[0][1], memory)


@cache
def model_of(name: str) -> ModelFiles:
    """`find_model`, which hashes files, once."""
    return find_model(name)


class Parts:
    """The parts of one corpus, division and seed, in `folder`."""

    def __init__(
        self, folder: Path, corpus: Corpus, division: Division, seed: int, scenario: str, device: str = "cpu"
    ) -> None:
        self.folder, self.corpus, self.division, self.seed = folder, corpus, division, seed
        self._scenario, self.device = scenario, device

    def _part(
        self, kind: str, made_of: list[Any], under: list[Part], make: Callable[[Checkpoints], dict[str, bytes]]
    ) -> Part:
        facts = [*made_of, *(part.key for part in under)]
        key = fingerprint([kind, facts])[:16]
        folder, before = self.folder / f"{kind}-{key}", Cost()
        for part in under:
            before += part.cost

        def made() -> dict[str, Any]:
            log(f"[benchmark] {self.corpus.name}, {self._scenario}, seed {self.seed}: {kind} {json.dumps(made_of)}")
            files, cost = measured(lambda: make(Checkpoints(str(folder / "state"))), self.device)
            folder.mkdir(parents=True, exist_ok=True)
            for name, body in files.items():
                (folder / name).write_bytes(body)
            shutil.rmtree(folder / "state", ignore_errors=True)
            return {"of": facts, "seconds": cost.seconds, "memory": cost.memory}

        # The facts come last: a part without them is made again.
        kept = Kept(folder, "facts").once(made)
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "facts.json"}
        return Part(files, before + Cost(kept["seconds"], kept["memory"]), key)

    def backbone(self, options: Options) -> tuple[Backbone, Part]:
        """The CF model, trained until its validation items are not ranked better any more."""
        kind = options.backbone
        sizes = [options.dimension, options.cf_epochs, options.cf_patience]
        made_of = [kind, *sizes, self.seed, len(self.corpus.titles), fingerprint([], *self._trained_on())]

        def make(checkpoints: Checkpoints) -> dict[str, bytes]:
            if kind in cf_model.ENGINES:
                users, items = self._factors(options)
                return {"factors.safetensors": safetensors.numpy.save({"users": users, "items": items})}
            train = self.division.split.train
            config = {"items": len(self.corpus.titles), "dimension": options.dimension}
            if kind == "ncf":
                config["users"] = len(train)
            model = backbone.build(kind, self.seed, **config).to(options.device)
            looked_at = sampled_ranking.validation(backbone.of(model), self.division.split, self.seed, max_users=2000)
            trainer: Any = ncf if kind == "ncf" else sequence_training
            how = trainer.Options(epochs=options.cf_epochs, patience=options.cf_patience, seed=self.seed)
            trainer.train(model, train, how, log, validate=looked_at, checkpoints=checkpoints)
            return backbone.dump(model)

        part = self._part("backbone", made_of, [], make)
        if kind in cf_model.ENGINES:
            factors = safetensors.numpy.load(part.files["factors.safetensors"])
            return MatrixBackbone(factors["users"], factors["items"]), part
        return backbone.of(backbone.load(part.files)), part

    def _trained_on(self) -> list[np.ndarray]:
        split = self.division.split
        return [split.train.indptr, split.train.items, split.validation]

    def _factors(self, options: Options) -> tuple[Matrix, Matrix]:
        train = self.division.split.train
        pairs = np.unique(np.stack([train.rows, train.items], 1), axis=0)
        sizes = len(train), len(self.corpus.titles)
        data = Pairs(pairs[:, 0], pairs[:, 1], np.ones(len(pairs), np.float32))
        if options.backbone == "als_cg":
            return cf_model.fit("als_cg", data, *sizes, CfParams(options.dimension, device=options.device), self.seed)
        # Not tuned here: the patience decides how long.
        params = CfParams(
            options.dimension, options.cf_epochs, learning_rate=0.002, batch_size=2048, device=options.device
        )
        best: list[Any] = [-1.0, 0, None]

        def told(epoch: int, embeddings: Callable[[], tuple[Matrix, Matrix]]) -> bool:
            if epoch % _LOOK and epoch != options.cf_epochs:
                return False
            found = embeddings()
            model = MatrixBackbone(*found)
            score = sampled_ranking.validation(model, self.division.split, self.seed, max_users=2000)()
            log(f"epoch {epoch}/{options.cf_epochs}: validation {score:.4f}")
            if score > best[0]:
                best[:] = [score, epoch, found]
            return epoch - best[1] >= options.cf_patience

        cf_model.fit(options.backbone, data, *sizes, params, self.seed, None, told)
        return best[2]

    def texts(self, options: Options, corpus: Corpus | None = None, adapted: Part | None = None) -> tuple[Matrix, Part]:
        """[I, width]: embeddings of the texts of this corpus or another one, perhaps with trained adapters."""
        corpus = corpus or self.corpus
        widths = {name: hashed_words.width_of(name) for name in options.text_model.split("+")}
        known = [hashed_words.version(w, _TEXT_TOKENS) if w else model_of(name).identity for name, w in widths.items()]
        made_of = ["+".join(known), _TEXT_TOKENS, fingerprint(corpus.texts)]

        def make(checkpoints: Checkpoints) -> dict[str, bytes]:
            side_by_side = []
            for name, width in widths.items():
                if width:
                    side_by_side.append(HashedWords(width, _TEXT_TOKENS).encode(corpus.texts))
                    continue
                encoder = self._encoder(options, name)
                if adapted:
                    lora.merge(encoder, adapted.files)
                side_by_side.append(encoder.encode(corpus.texts))
            return {"texts.safetensors": safetensors.numpy.save({"texts": np.concatenate(side_by_side, axis=1)})}

        part = self._part("texts", made_of, [adapted] if adapted else [], make)
        return safetensors.numpy.load(part.files["texts.safetensors"])["texts"], part

    def _encoder(self, options: Options, name: str) -> TextEncoder:
        return TextEncoder(
            model_of(name).directory,
            max_tokens=_TEXT_TOKENS,
            batch_tokens=2048,
            device=options.device,
        )

    def alignment(self, options: Options) -> tuple[allmrec_alignment.Alignment, Part, Part | None]:
        """The first stage; its part, and that of the sentence encoder's adapters, if it is trained along.

        Which it is behind the epochs with frozen texts, for `tuned_epochs`, with `tuned_users`: the paper trains it from the
        beginning, which takes hours without a GPU.
        """
        model, below = self.backbone(options)
        texts, encoded = self.texts(options)
        beta = _BETA.get(self.corpus.name, 0.5)
        weights = allmrec_alignment.Weights(
            match=options.match,
            alpha=0.5 * options.reconstruction,
            beta=beta * options.reconstruction,
            recommendation=options.recommendation,
            text_recommendation=options.text_recommendation,
        )
        how = allmrec_alignment_training.Options(epochs=options.alignment_epochs, seed=self.seed, weights=weights)
        if options.deep:
            how = replace(how, optimizer="adamw", learning_rate=3e-4, weight_decay=0.1)
        pool = np.flatnonzero(self.division.counts)

        def learn(
            joint: allmrec_alignment.Alignment, q: Any, how: Any, most: int, checkpoints: Checkpoints
        ) -> dict[str, bytes]:
            data = allmrec_data.some(allmrec_data.examples(self.division, model), most, self.seed)
            # A validation of a trained encoder would encode its texts anew each epoch.
            looked_at = allmrec_data.validation(self.division, model) if not most else None
            allmrec_alignment_training.train(
                joint, q, model.items, data, pool, how, log, validation=looked_at, checkpoints=checkpoints
            )
            return allmrec_alignment.dump(joint)

        def make(checkpoints: Checkpoints) -> dict[str, bytes]:
            config = allmrec_alignment.Config(options.dimension, texts.shape[1], deep=options.deep)
            joint = allmrec_alignment.build(config, self.seed)
            joint.standardise(model.items[pool], texts[pool])
            return learn(joint.to(options.device), FrozenTexts(texts).to(options.device), how, 0, checkpoints)

        made_of = [options.match, options.reconstruction, options.recommendation, options.text_recommendation]
        made_of += [options.deep, options.alignment_epochs, beta, self.seed]
        aligned = self._part("alignment", made_of, [below, encoded], make)
        if not options.tuned:
            return allmrec_alignment.load(aligned.files), aligned, None

        def tune(checkpoints: Checkpoints) -> dict[str, bytes]:
            encoder = self._encoder(options, options.text_model)
            lora.attach(encoder, **_LORA, seed=self.seed, targets="all_linear")  # type: ignore[arg-type]
            joint = allmrec_alignment.load(aligned.files).to(options.device)
            longer = replace(how, epochs=options.tuned_epochs, patience=options.tuned_epochs)
            most = options.tuned_users or len(self.division.split.train)
            found = learn(joint, lora.LoraTexts(encoder, self.corpus.texts), longer, most, checkpoints)
            return {**found, **lora.dump(encoder)}

        tuned = self._part("tuned", [options.tuned_epochs, options.tuned_users], [aligned], tune)
        return allmrec_alignment.load(tuned.files), tuned, tuned

    def joint(self, options: Options) -> tuple[allmrec_alignment.Alignment, Matrix, Part, Part | None]:
        """The first stage and the items' joint vectors, q_i where the division says so; last the adapters or None."""
        model, _ = self.backbone(options)
        alignment, part, adapted = self.alignment(options)
        texts, encoded = self.texts(options, adapted=adapted)
        joint = alignment.joint(model.items, texts, self.division.text_side)
        # Frozen texts are in the alignment's cost already.
        return alignment, joint, replace(part, cost=encoded.cost if adapted else part.cost), adapted

    def reader(self, options: Options) -> tuple[Reader, Matrix, Part]:
        """The second stage and the joint vectors that it was trained with; without soft tokens it is not trained."""
        reader = Reader(model_of(options.model).directory, dtype=options.dtype, device=options.device)  # type: ignore[arg-type]
        n_items, known = len(self.corpus.titles), model_of(options.model).identity
        if not (options.user or options.items):
            joint = np.zeros((n_items, 1), np.float32)
            # Read by nothing.
            reader.projections = allmrec_projections.build(allmrec_projections.Config(1, 1, reader.width), self.seed)
            return reader, joint, Part({}, Cost(), known)
        model, _ = self.backbone(options)
        _, joint, part, _ = self.joint(options)
        if options.random_joint:
            joint = allmrec_alignment.random_joint(n_items, joint.shape[1], self.seed)

        def make(checkpoints: Checkpoints) -> dict[str, bytes]:
            data = allmrec_data.some(allmrec_data.examples(self.division, model), options.train_users, self.seed)
            how = allmrec_reader_training.Options(
                epochs=options.epochs, seed=self.seed, learning_rate=options.learning_rate
            )
            # The test draws its candidates from all items, and so does the training.
            pool = np.arange(n_items)
            catalogue = catalogue_of(reader, self.corpus, joint, options)
            allmrec_reader_training.train(reader, catalogue, data, pool, how, log, checkpoints=checkpoints)
            assert reader.projections is not None
            return allmrec_projections.dump(reader.projections)

        made_of = [known, options.user, options.items, options.candidates, options.random_joint]
        made_of += [options.train_users, options.epochs]
        made_of += [options.history, options.title_tokens, options.learning_rate, options.dtype, self.seed]
        made_of += [self.corpus.name, fingerprint(self.corpus.titles, self.division.text_side)]
        trained = self._part("reader", made_of, [part], make)
        reader.projections = allmrec_projections.load(trained.files).to(reader.device)
        return reader, joint, trained

    def likelihoods(
        self, options: Options, reader: Part, titles: list[str], asked: list[np.ndarray], score: Callable[[], Matrix]
    ) -> tuple[Matrix, Cost]:
        """What `score` gives, [n, 20], kept for the rows that ask the same reader the same; its cost, without the reader's."""
        made_of = [reader.key, options.user, options.items, options.candidates, options.history, options.title_tokens]
        made_of += [options.dtype, self.corpus.name, fingerprint(titles, *asked)]

        def make(checkpoints: Checkpoints) -> dict[str, bytes]:
            return {"likelihoods.safetensors": safetensors.numpy.save({"likelihoods": score()})}

        part = self._part("likelihoods", made_of, [], make)
        return safetensors.numpy.load(part.files["likelihoods.safetensors"])["likelihoods"], part.cost


def catalogue_of(reader: Reader, corpus: Corpus, joint: Matrix, options: Options) -> Catalogue:
    """A corpus as the reader is asked about it."""
    prompts = PromptOptions(
        DOMAINS[_WORDING.get(corpus.name, "items")], options.history, options.title_tokens, options.user, options.items,
        options.candidates,
    )  # fmt: skip
    return reader.catalogue(corpus.titles, joint, prompts)

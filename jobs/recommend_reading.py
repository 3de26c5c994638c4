"""Users' candidates through the language model: shards over Ray actors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jobs import allmrec_artifacts, allmrec_reader
from jobs.allmrec_night import Night
from jobs.allmrec_reader import Spoken
from jobs.ray_cluster import cluster
from jobs.run import Run
from udfs.actor_pool import map_ordered
from udfs.allmrec_actor import ReaderActor, Shard
from udfs.progress import Progress
from udfs.vectors import Matrix


def likelihoods(
    run: Run,
    night: Night,
    items: Spoken,
    reader: str,
    shards: Iterable[Shard],
    users: int,
    generate: bool = False,
) -> Iterator[tuple[Matrix, list[str] | None]]:
    """Of each shard, in their order, what `ReaderActor.work` gives.

    Args:
        reader: version of its artifact. users: of all shards together.

    Raises:
        jobs.ray_cluster.ClusterError, udfs.actor_pool.WorkerError: Ray or a worker failed.
    """
    settings, ray_settings = run.settings.allmrec.reader, run.settings.ray
    model = allmrec_reader.language_model(settings)
    with cluster(ray_settings), Progress("recommend", users, "users") as progress:
        import ray

        # Put once: the actors of a machine read the same memory.
        titles, joint = ray.put(night.titles), ray.put(items.joint)
        arguments = (
            model,
            model.resolve()[1],
            allmrec_artifacts.files(run, allmrec_reader.KIND, reader),
            titles,
            joint,
            allmrec_reader.prompt_options(settings),
            settings.normalise,
            generate,
            "cuda" if ray_settings.gpus_per_actor > 0 else "cpu",
        )
        results = map_ordered(
            ReaderActor,
            arguments,
            shards,
            actors=min(ray_settings.actors, -(-users // settings.shard_users)),
            cpus=ray_settings.cpus_per_actor,
            gpus=ray_settings.gpus_per_actor,
        )
        for scores, written in results:
            yield scores, written
            progress.advance(len(scores))

"""What every training task does around its recipe: a folder for the run, inputs fetched, a checkpoint filled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lib.config.recipes import TrainJob
from lib.core.paths import runs_root
from tasks.artifact_type import Artifact
from tasks.artifacts import CheckpointFolder
from tasks.clusters import placed
from tasks.lazy import lazy
from tasks.progress import bar
from tasks.tokenize import take_tokenizer, tokenize

if TYPE_CHECKING:
    from lib.cluster import ray_backend
    from lib.models import logit_report
    from lib.train import run
else:
    ray_backend = lazy("lib.cluster.ray_backend")
    logit_report = lazy("lib.models.logit_report")
    run = lazy("lib.train.run")


@dataclass(frozen=True)
class Given:
    """The artifacts that a training task takes."""

    model: Artifact
    data: Artifact
    report: Artifact
    resume_from: Artifact | None
    """A checkpoint of another run; this one begins with its state."""


def start(rows: Any, tokens: Any, *, job: TrainJob, model: Artifact, data: Artifact, given: dict[str, Any]) -> Any:
    """Call one of two tasks on a cluster of the job's size: that for rows, or that for tokens with the rows tokenised before.

    Args:
        given: what both take beside the model.
    """
    cluster = placed(job.shape)
    if not job.config.data.tokenize_first:
        return rows(model=model, data=data, **given).with_overrides(**cluster)
    tokenised = tokenize(data=data, tokenizer=take_tokenizer(model=model), config=job.config.data.chat)
    return tokens(model=model, tokens=tokenised, **given).with_overrides(**cluster)


def train_recipe(name: str, recipe: Callable[..., None], *, job: TrainJob, given: Given, code: str) -> CheckpointFolder:
    """Train, or go on where an earlier try of the same run was interrupted.

    Args:
        recipe: fills a checkpoint, as `run_sft` does.
        code: version of the task's code; another one begins anew.
    """
    model, data, begun = given.model, given.data, given.resume_from
    digests = {"model_digest": model.digest, "data_digest": data.digest}
    identity = run.run_identity(name, job, **digests, from_digest=begun.digest if begun else None)
    run_dir = runs_root() / f"{name}-{identity[:16]}-{code[:8]}"
    checkpoint = CheckpointFolder.create()
    with checkpoint.write() as out, bar("train", "steps", job.steps) as shown:
        out.lineage["logit_report"] = given.report.digest
        proof, home = logit_report.read_logit_report(given.report.open()), job.config.cluster.home_of(run_dir.name)
        origins, state = run.Origins(model.uri, data.uri), begun.open() if begun else None
        inputs = run.RunInputs(model.open(), data.open(), proof, run_dir, state, home, origins)
        recipe(job, inputs, out, group_factory=ray_backend.RayGroup, progress=shown.tell)
    return checkpoint

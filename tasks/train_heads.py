"""Training named outputs on a Ray cluster of the size that the inputs ask for."""

from typing import TYPE_CHECKING, NamedTuple

from flytekit import dynamic, task

from lib.config.evaluation import HeadsEvalJob
from lib.config.recipes import HeadsJob, HeadsRecipeConfig
from lib.config.rows import RowsConfig
from tasks.artifacts import Checkpoint, CheckpointFolder, Dataset, LogitReport, ModelArtifact, TokenizedDataset
from tasks.cache import CACHED, code_version
from tasks.environments import CPU_IMAGE, RETRIES, SMALL, retry_infrastructure
from tasks.lazy import lazy
from tasks.on_ray import ON_RAY
from tasks.training import Given, start, train_recipe

if TYPE_CHECKING:
    from lib.recipes import heads
else:
    heads = lazy("lib.recipes.heads")


class CheckedHeads(NamedTuple):
    """A job and what follows from it."""

    job: HeadsJob
    train_rows: RowsConfig
    eval_rows: RowsConfig
    scoring: HeadsEvalJob


@task(cache=CACHED, container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
def check_heads_job(
    learning_rate: float,
    steps: int,
    sequence_length: int,
    nodes: int,
    gpus_per_node: int,
    config: HeadsRecipeConfig,
    train_rows: RowsConfig,
    eval_rows: RowsConfig,
) -> CheckedHeads:
    """Refuse wrong or contradicting settings before anything is computed; rows are read with labels for these heads."""
    size = {"steps": steps, "sequence_length": sequence_length, "nodes": nodes, "gpus_per_node": gpus_per_node}
    job = HeadsJob.parse({"learning_rate": learning_rate, **size, "config": config}, where="inputs of the workflow")
    return CheckedHeads(job, config.read_rows(train_rows), config.read_rows(eval_rows), job.scoring)


@task(**ON_RAY)
@retry_infrastructure
def train_heads_on_ray(
    model: ModelArtifact, data: Dataset, report: LogitReport, job: HeadsJob, resume_from: Checkpoint | None = None
) -> Checkpoint:
    """Train, or go on where an earlier try of the same run was interrupted.

    resume_from: a checkpoint of another run; this one begins with its state.
    """
    return _train(Given(model, data, report, resume_from), job)


@task(**ON_RAY)
@retry_infrastructure
def train_heads_tokens_on_ray(
    model: ModelArtifact, tokens: TokenizedDataset, report: LogitReport, job: HeadsJob, resume_from: Checkpoint | None = None
) -> Checkpoint:
    """The same on conversations that were tokenised before; their labels are in the tokenised data set."""
    return _train(Given(model, tokens, report, resume_from), job)


def _train(given: Given, job: HeadsJob) -> CheckpointFolder:
    return train_recipe(heads.NAME, heads.run_heads, job=job, given=given, code=code_version(__name__, "_train", __file__))


@dynamic(cache=CACHED, container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
def train_heads(
    model: ModelArtifact, data: Dataset, report: LogitReport, job: HeadsJob, resume_from: Checkpoint | None = None
) -> Checkpoint:
    """Size the cluster from the job; an override in a static workflow would be lost."""
    tasks, given = (train_heads_on_ray, train_heads_tokens_on_ray), {"report": report, "job": job, "resume_from": resume_from}
    return start(*tasks, job=job, model=model, data=data, given=given)

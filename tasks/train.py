"""Supervised fine-tuning on a Ray cluster of the size that the inputs ask for."""

from typing import TYPE_CHECKING

from flytekit import dynamic, task

from lib.config.recipes import SftConfig, SftJob
from tasks.artifacts import Checkpoint, CheckpointFolder, Dataset, LogitReport, ModelArtifact, TokenizedDataset
from tasks.cache import CACHED, code_version
from tasks.environments import CPU_IMAGE, RETRIES, SMALL, retry_infrastructure
from tasks.lazy import lazy
from tasks.on_ray import ON_RAY
from tasks.training import Given, start, train_recipe

if TYPE_CHECKING:
    from lib.recipes import sft
else:
    sft = lazy("lib.recipes.sft")


@task(cache=CACHED, container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
def check_job(
    learning_rate: float, steps: int, sequence_length: int, nodes: int, gpus_per_node: int, config: SftConfig
) -> SftJob:
    """Refuse wrong or contradicting settings before anything is computed."""
    return SftJob.parse(locals(), where="inputs of the workflow")


@task(**ON_RAY)
@retry_infrastructure
def train_on_ray(
    model: ModelArtifact, data: Dataset, report: LogitReport, job: SftJob, resume_from: Checkpoint | None = None
) -> Checkpoint:
    """Train, or go on where an earlier try of the same run was interrupted.

    resume_from: a checkpoint of another run; this one begins with its state.
    """
    return _train(Given(model, data, report, resume_from), job)


@task(**ON_RAY)
@retry_infrastructure
def train_tokens_on_ray(
    model: ModelArtifact, tokens: TokenizedDataset, report: LogitReport, job: SftJob, resume_from: Checkpoint | None = None
) -> Checkpoint:
    """The same on conversations that were tokenised before, by this model's tokenizer and the rules of this job."""
    return _train(Given(model, tokens, report, resume_from), job)


def _train(given: Given, job: SftJob) -> CheckpointFolder:
    return train_recipe(sft.NAME, sft.run_sft, job=job, given=given, code=code_version(__name__, "_train", __file__))


@dynamic(cache=CACHED, container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
def train(
    model: ModelArtifact, data: Dataset, report: LogitReport, job: SftJob, resume_from: Checkpoint | None = None
) -> Checkpoint:
    """Size the cluster from the job; an override in a static workflow would be lost."""
    tasks, given = (train_on_ray, train_tokens_on_ray), {"report": report, "job": job, "resume_from": resume_from}
    return start(*tasks, job=job, model=model, data=data, given=given)

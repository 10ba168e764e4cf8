"""Supervised fine-tuning on a Ray cluster of the size that the inputs ask for."""

from flytekit import dynamic, task
from lib.recipes.sft import run_sft

from lib.cluster.ray_backend import RayGroup
from lib.config.recipes import SftConfig, SftJob
from lib.core.manifest import digest_of
from lib.core.paths import runs_root
from lib.models.verify import read_logit_report
from tasks.artifacts import Checkpoint, CheckpointFolder, Dataset, LogitReport, ModelArtifact
from tasks.cache import CACHED, code_version
from tasks.clusters import ray_job
from tasks.environments import CPU_IMAGE, LONG, RETRIES, SMALL, TRAIN_IMAGE, retry_infrastructure
from tasks.progress import training_bar


@task(cache=CACHED, container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
def check_job(
    learning_rate: float, steps: int, sequence_length: int, nodes: int, gpus_per_node: int, config: SftConfig
) -> SftJob:
    """Refuse wrong or contradicting settings before anything is computed."""
    return SftJob.parse(locals(), where="inputs of the workflow")


@task(
    cache=CACHED,
    container_image=TRAIN_IMAGE,
    requests=SMALL,
    retries=RETRIES,
    timeout=LONG,
    task_config=ray_job(SftJob(learning_rate=1e-5, steps=100, sequence_length=512, nodes=1, gpus_per_node=0).shape),
)
@retry_infrastructure
def train_on_ray(model: ModelArtifact, data: Dataset, report: LogitReport, job: SftJob) -> Checkpoint:
    """Train, or go on where an earlier try of the same run was interrupted."""
    lineage = {"model": model.digest, "data": data.digest, "job": digest_of(job.model_dump(mode="json"))}
    run_dir = runs_root() / digest_of({**lineage, "code": code_version(__name__, "train_on_ray", __file__)})[:16]
    checkpoint = CheckpointFolder.create()
    with checkpoint.write() as staged, training_bar(job.steps) as progress:
        staged.lineage.update(lineage, logit_report=report.digest)
        proof = read_logit_report(report.open())
        run_sft(job, model.open(), data.open(), proof, staged, run_dir=run_dir, group_factory=RayGroup, progress=progress)
    return checkpoint


@dynamic(cache=CACHED, container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
def train(model: ModelArtifact, data: Dataset, report: LogitReport, job: SftJob) -> Checkpoint:
    """Size the cluster from the job; an override in a static workflow would be lost."""
    return train_on_ray(model=model, data=data, report=report, job=job).with_overrides(task_config=ray_job(job.shape))

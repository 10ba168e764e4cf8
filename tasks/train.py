"""Supervised fine-tuning on a Ray cluster of the size that the inputs ask for."""

from typing import TYPE_CHECKING

from flytekit import dynamic, task

from lib.config.recipes import SftConfig, SftJob
from lib.core.paths import runs_root
from tasks.artifacts import Checkpoint, CheckpointFolder, Dataset, LogitReport, ModelArtifact
from tasks.cache import CACHED, code_version
from tasks.clusters import ray_job
from tasks.environments import CPU_IMAGE, LONG, RETRIES, SMALL, TRAIN_IMAGE, retry_infrastructure
from tasks.lazy import lazy
from tasks.progress import bar

if TYPE_CHECKING:
    from lib.cluster import ray_backend
    from lib.models import verify
    from lib.recipes import sft
else:
    ray_backend = lazy("lib.cluster.ray_backend")
    verify = lazy("lib.models.verify")
    sft = lazy("lib.recipes.sft")


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
    identity = sft.run_identity(job, model_digest=model.digest, data_digest=data.digest)
    run_dir = runs_root() / f"sft-{identity[:16]}-{code_version(__name__, 'train_on_ray', __file__)[:8]}"
    checkpoint = CheckpointFolder.create()
    with checkpoint.write() as out, bar("train", "steps", job.steps) as shown:
        out.lineage["logit_report"] = report.digest
        inputs = (job, model.open(), data.open(), verify.read_logit_report(report.open()), out)
        sft.run_sft(*inputs, run_dir=run_dir, group_factory=ray_backend.RayGroup, progress=shown.tell)
    return checkpoint


@dynamic(cache=CACHED, container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
def train(model: ModelArtifact, data: Dataset, report: LogitReport, job: SftJob) -> Checkpoint:
    """Size the cluster from the job; an override in a static workflow would be lost."""
    return train_on_ray(model=model, data=data, report=report, job=job).with_overrides(task_config=ray_job(job.shape))

"""Training named outputs on a Ray cluster of the size that the inputs ask for."""

from typing import TYPE_CHECKING, NamedTuple

from flytekit import dynamic, task

from lib.config.evaluation import HeadsEvalJob
from lib.config.parallel import ClusterShape
from lib.config.recipes import HeadsJob, HeadsRecipeConfig
from lib.config.rows import RowsConfig
from lib.core.paths import runs_root
from tasks.artifact_type import Artifact
from tasks.artifacts import Checkpoint, CheckpointFolder, Dataset, LogitReport, ModelArtifact, TokenizedDataset
from tasks.cache import CACHED, code_version
from tasks.clusters import placed, ray_job
from tasks.environments import CPU_IMAGE, LONG, RETRIES, SMALL, TRAIN_IMAGE, retry_infrastructure
from tasks.lazy import lazy
from tasks.progress import bar
from tasks.tokenize import take_tokenizer, tokenize

if TYPE_CHECKING:
    from lib.cluster import ray_backend
    from lib.models import logit_report
    from lib.recipes import heads
    from lib.train import run
else:
    ray_backend = lazy("lib.cluster.ray_backend")
    logit_report = lazy("lib.models.logit_report")
    run = lazy("lib.train.run")
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


_ON_RAY = {
    "cache": CACHED,
    "container_image": TRAIN_IMAGE,
    "requests": SMALL,
    "retries": RETRIES,
    "timeout": LONG,
    "task_config": ray_job(ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=1, threads_per_rank=1)),
}


@task(**_ON_RAY)
@retry_infrastructure
def train_heads_on_ray(model: ModelArtifact, data: Dataset, report: LogitReport, job: HeadsJob) -> Checkpoint:
    """Train, or go on where an earlier try of the same run was interrupted."""
    return _train(model, data, report, job)


@task(**_ON_RAY)
@retry_infrastructure
def train_heads_tokens_on_ray(model: ModelArtifact, tokens: TokenizedDataset, report: LogitReport, job: HeadsJob) -> Checkpoint:
    """The same on conversations that were tokenised before; their labels are in the tokenised data set."""
    return _train(model, tokens, report, job)


def _train(model: Artifact, data: Artifact, report: Artifact, job: HeadsJob) -> CheckpointFolder:
    identity = run.run_identity(heads.NAME, job, model_digest=model.digest, data_digest=data.digest)
    run_dir = runs_root() / f"heads-{identity[:16]}-{code_version(__name__, '_train', __file__)[:8]}"
    checkpoint = CheckpointFolder.create()
    with checkpoint.write() as out, bar("train", "steps", job.steps) as shown:
        out.lineage["logit_report"] = report.digest
        proof, home = logit_report.read_logit_report(report.open()), job.config.cluster.home_of(run_dir.name)
        origins = run.Origins(model.uri, data.uri)
        inputs = run.RunInputs(model.open(), data.open(), proof, run_dir, home=home, origins=origins)
        heads.run_heads(job, inputs, out, group_factory=ray_backend.RayGroup, progress=shown.tell)
    return checkpoint


@dynamic(cache=CACHED, container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
def train_heads(model: ModelArtifact, data: Dataset, report: LogitReport, job: HeadsJob) -> Checkpoint:
    """Size the cluster from the job; an override in a static workflow would be lost."""
    cluster = placed(job.shape)
    if not job.config.data.tokenize_first:
        return train_heads_on_ray(model=model, data=data, report=report, job=job).with_overrides(**cluster)
    tokens = tokenize(data=data, tokenizer=take_tokenizer(model=model), config=job.config.data.chat)
    return train_heads_tokens_on_ray(model=model, tokens=tokens, report=report, job=job).with_overrides(**cluster)

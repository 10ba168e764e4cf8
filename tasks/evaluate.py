"""Scoring a model on a data set, with real engines on a Ray cluster of the size that the inputs ask for."""

from typing import TYPE_CHECKING

from flytekit import dynamic, task

from lib.config.evaluation import EvalConfig
from tasks.artifacts import Dataset, EvalReport, EvalReportFolder, ModelArtifact
from tasks.cache import CACHED
from tasks.clusters import engine_shape, placed
from tasks.environments import CPU_IMAGE, RETRIES, SMALL, retry_infrastructure
from tasks.lazy import lazy
from tasks.on_ray import ON_RAY
from tasks.progress import bar

if TYPE_CHECKING:
    from lib.cluster import ray_backend
    from lib.evals import report as eval_report
    from lib.recipes import evaluate as recipe
else:
    ray_backend = lazy("lib.cluster.ray_backend")
    eval_report = lazy("lib.evals.report")
    recipe = lazy("lib.recipes.evaluate")


@task(**ON_RAY)
@retry_infrastructure
def evaluate_on_ray(model: ModelArtifact, data: Dataset, config: EvalConfig, gpus_per_node: int) -> EvalReport:
    """Generate an answer to each row, compare it with the row's own, and measure the held-out loss."""
    report = EvalReportFolder.create()
    with report.write() as staged, bar("evaluate", "rows") as shown:
        staged.lineage.update(model=model.digest, data=data.digest)
        shape = engine_shape(config, gpus_per_node)
        parts = (model.open(), data.open(), config)
        scores = recipe.run_evaluation(*parts, group_factory=ray_backend.RayGroup, progress=shown.reach, shape=shape)
        eval_report.write_eval_report(scores, staged)
    return report


@dynamic(cache=CACHED, container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
def evaluate(model: ModelArtifact, data: Dataset, config: EvalConfig, gpus_per_node: int) -> EvalReport:
    """Size the cluster from the number of engines; an override in a static workflow would be lost."""
    inputs = {"model": model, "data": data, "config": config, "gpus_per_node": gpus_per_node}
    return evaluate_on_ray(**inputs).with_overrides(**placed(engine_shape(config, gpus_per_node)))

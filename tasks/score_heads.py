"""Scoring output heads on held-out rows, before and after they are trained, and the page about it."""

from typing import TYPE_CHECKING

from flytekit import Deck, dynamic, task

from lib.config.evaluation import HeadsEvalConfig, HeadsEvalJob
from tasks.artifacts import Checkpoint, Dataset, HeadsReport, HeadsReportFolder, ModelArtifact, Report, ReportFolder
from tasks.cache import CACHED
from tasks.clusters import placed
from tasks.environments import CPU_IMAGE, MEDIUM, RETRIES, SHORT, SMALL, retry_infrastructure
from tasks.lazy import lazy
from tasks.on_ray import ON_RAY
from tasks.progress import bar

if TYPE_CHECKING:
    from lib.cluster import ray_backend
    from lib.evals import heads, heads_page
    from lib.recipes import evaluate_heads
    from lib.train import tracking
else:
    evaluate_heads = lazy("lib.recipes.evaluate_heads")
    heads = lazy("lib.evals.heads")
    heads_page = lazy("lib.evals.heads_page")
    ray_backend = lazy("lib.cluster.ray_backend")
    tracking = lazy("lib.train.tracking")


@task(**ON_RAY)
@retry_infrastructure
def score_heads_on_ray(model: ModelArtifact, data: Dataset, job: HeadsEvalJob, config: HeadsEvalConfig) -> HeadsReport:
    """The loss of every head on held-out rows, and how often it is right."""
    report = HeadsReportFolder.create()
    with report.write() as staged, bar("score", "rows") as shown:
        staged.lineage.update(model=model.digest, data=data.digest)
        parts = (model.open(), data.open(), job, config)
        scores = evaluate_heads.run_heads_evaluation(*parts, group_factory=ray_backend.RayGroup, progress=shown.reach)
        heads.write_heads_report(scores, staged)
    return report


@dynamic(cache=CACHED, container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
def score_heads(model: ModelArtifact, data: Dataset, job: HeadsEvalJob, config: HeadsEvalConfig) -> HeadsReport:
    """Size the cluster from the job; an override in a static workflow would be lost."""
    parts = {"model": model, "data": data, "job": job, "config": config}
    return score_heads_on_ray(**parts).with_overrides(**placed(job.shape))


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT, enable_deck=True)
@retry_infrastructure
def summarize_heads(checkpoint: Checkpoint, before: HeadsReport, after: HeadsReport) -> Report:
    """One page and one JSON object about the run; the scores go to MLflow beside the training metrics."""
    report = ReportFolder.create()
    with report.write() as staged:
        staged.lineage.update(checkpoint=checkpoint.digest, before=before.digest, after=after.digest)
        facts = heads_page.write_heads_page(staged, checkpoint=checkpoint.open(), before=before.open(), after=after.open())
        page = (staged.path / "report.html").read_text(encoding="utf-8")
    if facts["mlflow_run_id"]:
        tracking.log_evaluation(facts["mlflow_run_id"], heads_page.evaluation_metrics(facts))
        tracking.log_files(facts["mlflow_run_id"], [report.open() / "report.html"])
    Deck("report", page)
    return report

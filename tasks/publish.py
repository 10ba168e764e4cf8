"""What leaves a run: the trained model as a plain Hugging Face folder, and the report that a person reads."""

from typing import TYPE_CHECKING

from flytekit import Deck, task

from lib.config.evaluation import EvalConfig
from tasks.artifacts import Checkpoint, Dataset, EvalReport, ModelArtifact, ModelFolder, Report, ReportFolder
from tasks.cache import CACHED
from tasks.environments import CPU_IMAGE, MEDIUM, RETRIES, SHORT, retry_infrastructure
from tasks.lazy import lazy

if TYPE_CHECKING:
    from lib.evals import summary
    from lib.models import admit
    from lib.train import tracking
else:
    summary = lazy("lib.evals.summary")
    admit = lazy("lib.models.admit")
    tracking = lazy("lib.train.tracking")


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def export_model(checkpoint: Checkpoint) -> ModelArtifact:
    """The trained weights, config and tokenizer, through the same gate as a model that comes from outside."""
    model = ModelFolder.create()
    with model.write() as staged:
        staged.lineage["checkpoint"] = checkpoint.digest
        admit.admit_model(checkpoint.open() / "hf", staged)
    return model


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT, enable_deck=True)
@retry_infrastructure
def summarize(
    checkpoint: Checkpoint,
    train_data: Dataset,
    eval_data: Dataset,
    before: EvalReport,
    after: EvalReport,
    config: EvalConfig,
) -> Report:
    """One page and one JSON object about the whole run; the scores go to MLflow beside the training metrics."""
    parts = {"checkpoint": checkpoint, "train_data": train_data, "eval_data": eval_data, "before": before, "after": after}
    report = ReportFolder.create()
    with report.write() as staged:
        staged.lineage.update({name: part.digest for name, part in parts.items()})
        folders = {name: part.open() for name, part in parts.items()}
        facts = summary.write_report(staged, **folders, num_samples=config.num_samples_shown)
        page = (staged.path / "report.html").read_text(encoding="utf-8")
    if facts["mlflow_run_id"]:
        tracking.log_evaluation(facts["mlflow_run_id"], summary.evaluation_metrics(facts))
        tracking.log_files(facts["mlflow_run_id"], [report.open() / "report.html"])
    Deck("report", page)
    return report

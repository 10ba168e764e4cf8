"""Supervised fine-tuning: rows and a model in, a trained and scored model out.

pyflyte -c flyte.config run workflows/sft.py sft --inputs-file configs/sft/smollm2_quickstart.yaml
"""

from typing import NamedTuple

from flytekit import workflow

from lib.config.evaluation import EvalConfig
from lib.config.recipes import SftConfig
from lib.config.rows import RowsConfig
from lib.config.vocabulary import VocabularyConfig
from tasks.artifacts import Checkpoint, ModelArtifact, Report
from tasks.evaluate import evaluate
from tasks.prepare_model import prepare_model, stamp_model, verify_model
from tasks.publish import export_model, summarize
from tasks.sources import ModelSource, RawData
from tasks.train import check_job, train
from workflows.ingest import ROWS, ingest

DEFAULT_CONFIG, DEFAULT_EVALUATION, NO_TOKENS = SftConfig(), EvalConfig(), VocabularyConfig()


class SftOutputs(NamedTuple):
    """What a run hands over."""

    model: ModelArtifact
    checkpoint: Checkpoint
    report: Report


@workflow
def sft(  # noqa: PLR0913 - a workflow's inputs are its form in the console
    model: ModelSource,
    train_data: RawData,
    eval_data: RawData,
    learning_rate: float = 1e-4,
    steps: int = 100,
    sequence_length: int = 1024,
    nodes: int = 1,
    gpus_per_node: int = 0,
    train_rows: RowsConfig = ROWS,
    eval_rows: RowsConfig = ROWS,
    config: SftConfig = DEFAULT_CONFIG,
    evaluation: EvalConfig = DEFAULT_EVALUATION,
    vocabulary: VocabularyConfig = NO_TOKENS,
    resume_from: Checkpoint | None = None,
) -> SftOutputs:
    """Fine-tune a model on conversations and compare it with itself before.

    Args:
        model: Hugging Face model folder, a path or a URI.
        train_data: conversations to learn from, in a layout of docs/data-formats.md: a file or a folder, a path or a URI.
        eval_data: conversations with answers to score the model on, before and after.
        learning_rate: peak of the schedule.
        steps: optimizer steps.
        sequence_length: tokens in a packed row.
        nodes: worker nodes of the training cluster.
        gpus_per_node: GPUs on each; 0 trains on CPU.
        train_rows: how the rows of `train_data` are read.
        eval_rows: how those of `eval_data` are read.
        config: everything else about training.
        evaluation: how the model is scored.
        vocabulary: tokens that the model gets before it is trained.
        resume_from: a checkpoint of an earlier run, of this model and data, whose training goes on.
    """
    size = {"steps": steps, "sequence_length": sequence_length, "nodes": nodes, "gpus_per_node": gpus_per_node}
    job = check_job(learning_rate=learning_rate, config=config, **size)
    rows = ingest(source=train_data, config=train_rows)
    held_out = ingest(source=eval_data, config=eval_rows)
    prepared = prepare_model(source=stamp_model(source=model), vocabulary=vocabulary)
    proof = verify_model(model=prepared)
    before = evaluate(model=prepared, data=held_out, config=evaluation, gpus_per_node=gpus_per_node)
    checkpoint = train(model=prepared, data=rows, report=proof, job=job, resume_from=resume_from)
    trained = export_model(checkpoint=checkpoint)
    after = evaluate(model=trained, data=held_out, config=evaluation, gpus_per_node=gpus_per_node)
    scores = {"before": before, "after": after, "config": evaluation}
    report = summarize(checkpoint=checkpoint, train_data=rows, eval_data=held_out, **scores)
    return SftOutputs(model=trained, checkpoint=checkpoint, report=report)

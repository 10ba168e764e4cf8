"""Training of named outputs: rows with labels and a model in, a model with heads and their scores out.

pyflyte -c flyte.config run workflows/heads.py heads --inputs-file configs/heads/smollm2_chain_sum.yaml
"""

from typing import NamedTuple

from flytekit import workflow

from lib.config.evaluation import HeadsEvalConfig
from lib.config.recipes import HeadsRecipeConfig
from lib.config.rows import RowsConfig
from lib.config.vocabulary import VocabularyConfig
from tasks.artifacts import Checkpoint, ModelArtifact, Report
from tasks.prepare_model import prepare_model, stamp_model, verify_model
from tasks.publish import export_model
from tasks.score_heads import score_heads, summarize_heads
from tasks.sources import ModelSource, RawData
from tasks.train_heads import check_heads_job, train_heads
from workflows.ingest import ROWS, ingest

DEFAULT_EVALUATION, NO_TOKENS = HeadsEvalConfig(), VocabularyConfig()


class HeadsOutputs(NamedTuple):
    """What a run hands over."""

    model: ModelArtifact
    checkpoint: Checkpoint
    report: Report


@workflow
def heads(  # noqa: PLR0913 - a workflow's inputs are its form in the console
    model: ModelSource,
    train_data: RawData,
    eval_data: RawData,
    config: HeadsRecipeConfig,
    learning_rate: float = 1e-5,
    steps: int = 100,
    sequence_length: int = 1024,
    nodes: int = 1,
    gpus_per_node: int = 0,
    train_rows: RowsConfig = ROWS,
    eval_rows: RowsConfig = ROWS,
    evaluation: HeadsEvalConfig = DEFAULT_EVALUATION,
    vocabulary: VocabularyConfig = NO_TOKENS,
    resume_from: Checkpoint | None = None,
) -> HeadsOutputs:
    """Train outputs beside or in place of the next token, and compare them with those that training began with.

    Args:
        model: Hugging Face model folder, a path or a URI.
        train_data: conversations or completions with `labels`, as docs/add-an-output-head.md has them.
        eval_data: rows to score the heads on, before and after.
        config: the heads, and everything else about training.
        learning_rate: peak of the schedule.
        steps: optimizer steps.
        sequence_length: tokens in a packed row.
        nodes: worker nodes of the training cluster.
        gpus_per_node: GPUs on each; 0 trains on CPU.
        train_rows: how the rows of `train_data` are read.
        eval_rows: how those of `eval_data` are read.
        evaluation: how many rows the heads are scored on.
        vocabulary: tokens that the model gets before it is trained.
        resume_from: a checkpoint of an earlier run, of this model, data and heads, whose training goes on.
    """
    size = {"steps": steps, "sequence_length": sequence_length, "nodes": nodes, "gpus_per_node": gpus_per_node}
    read = {"train_rows": train_rows, "eval_rows": eval_rows}
    checked = check_heads_job(learning_rate=learning_rate, config=config, **size, **read)
    rows = ingest(source=train_data, config=checked.train_rows)
    held_out = ingest(source=eval_data, config=checked.eval_rows)
    prepared = prepare_model(source=stamp_model(source=model), vocabulary=vocabulary)
    proof = verify_model(model=prepared)
    before = score_heads(model=prepared, data=held_out, job=checked.scoring, config=evaluation)
    checkpoint = train_heads(model=prepared, data=rows, report=proof, job=checked.job, resume_from=resume_from)
    trained = export_model(checkpoint=checkpoint)
    after = score_heads(model=trained, data=held_out, job=checked.scoring, config=evaluation)
    report = summarize_heads(checkpoint=checkpoint, before=before, after=after)
    return HeadsOutputs(model=trained, checkpoint=checkpoint, report=report)

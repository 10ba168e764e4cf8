"""Fine-tuning on a schedule: the time of the kickoff picks the rows."""

from datetime import datetime

from flytekit import workflow

from lib.config.evaluation import EvalConfig
from lib.config.recipes import SftConfig
from lib.config.rows import RowsConfig
from lib.config.vocabulary import VocabularyConfig
from tasks.ingest import data_window
from tasks.sources import ModelSource, RawData
from workflows.ingest import ROWS
from workflows.sft import DEFAULT_CONFIG, DEFAULT_EVALUATION, NO_TOKENS, SftOutputs, sft


@workflow
def retrain_sft(  # noqa: PLR0913 - a workflow's inputs are its form in the console
    kickoff_time: datetime,
    data_pattern: str,
    model: ModelSource,
    eval_data: RawData,
    learning_rate: float = 1e-5,
    steps: int = 1000,
    sequence_length: int = 4096,
    nodes: int = 1,
    gpus_per_node: int = 8,
    train_rows: RowsConfig = ROWS,
    eval_rows: RowsConfig = ROWS,
    config: SftConfig = DEFAULT_CONFIG,
    evaluation: EvalConfig = DEFAULT_EVALUATION,
    vocabulary: VocabularyConfig = NO_TOKENS,
) -> SftOutputs:
    """Fine-tune on the rows of the day before the kickoff.

    Args:
        kickoff_time: filled in by the schedule.
        data_pattern: address of a day's rows, with `%Y`, `%m` and `%d` where the date goes.
        model: see `sft`, as for all that follows.
        eval_data: see `sft`.
        learning_rate: see `sft`.
        steps: see `sft`.
        sequence_length: see `sft`.
        nodes: see `sft`.
        gpus_per_node: see `sft`.
        train_rows: see `sft`.
        eval_rows: see `sft`.
        config: see `sft`.
        evaluation: see `sft`.
        vocabulary: see `sft`.
    """
    return sft(
        model=model,
        train_data=data_window(pattern=data_pattern, kickoff_time=kickoff_time),
        eval_data=eval_data,
        learning_rate=learning_rate,
        steps=steps,
        sequence_length=sequence_length,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        train_rows=train_rows,
        eval_rows=eval_rows,
        config=config,
        evaluation=evaluation,
        vocabulary=vocabulary,
    )

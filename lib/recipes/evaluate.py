"""Scoring a model: greedy answers from engines, compared with the expected ones, and the held-out loss."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lib.cluster.group import Deadlines, Event, GroupFactory
from lib.config.evaluation import EvalConfig
from lib.config.parallel import ClusterShape
from lib.core.artifact import read_manifest
from lib.core.errors import ConfigError
from lib.core.examples import Conversation, Encoded
from lib.data.table import ExampleTable
from lib.evals.generation import answerable, encoded_rows, prompts_of, score_rows
from lib.evals.loss import pooled
from lib.evals.report import EvalReport, EvalRow, wilson_interval
from lib.evals.workers import EnginePool, EngineWorker, LossWorker
from lib.models.hf_fallback import read_size
from lib.rewards.catalogue import REWARDS
from lib.rollout.engine import engine_environment
from lib.rollout.types import Generation, SamplingParams
from lib.tokens.chat import ChatEncoder
from lib.tokens.rules import RULES_FILE, ChatRules
from lib.tokens.tokenizer import Tokenizer
from lib.train.environment import cpu_environment

TOKENS_PER_PACK = 2048
"""Of the held-out loss; changes speed and memory, not the result."""

Progress = Callable[[int], None]


def run_evaluation(
    model_dir: Path,
    data_dir: Path,
    config: EvalConfig,
    *,
    group_factory: GroupFactory,
    progress: Progress,
    shape: ClusterShape | None = None,
) -> EvalReport:
    """Evaluate a model artifact on the first `config.max_rows` rows of a data-set artifact.

    Args:
        progress: called with what is done so far; each row counts once when answered and once when its loss is known.
        shape: where the engines run, one a rank; by default all on one CPU node.
    Raises:
        DataError: no row can be scored, or one is too long; names its place.
        GenerationError: an engine failed; nothing is scored.
        WorkerDiedError: a rank of the held-out loss died.
    """
    table = ExampleTable.open(data_dir, Conversation)
    rows = table.rows(range(min(len(table), config.max_rows)))
    asked = answerable(rows, config.verifier)
    encoder = chat_encoder(model_dir, config)
    tokenizer = encoder.tokenizer
    max_positions = read_size(model_dir).max_positions
    prompts = prompts_of(asked, encoder, config.max_new_tokens, max_positions)
    encoded = encoded_rows(rows, encoder, max_positions)
    params = SamplingParams(max_new_tokens=config.max_new_tokens, stop_ids=encoder.stop_ids)

    run = _Run(model_dir, config, shape or _cpu_shape(config), group_factory, progress)
    generations = _generate(run, prompts, params)
    losses = _measure_loss(run, encoded, tokenizer.pad_id)

    return _report(config, score_rows(asked, generations, tokenizer, REWARDS[config.verifier]), losses, run.timings)


def chat_encoder(model_dir: Path, config: EvalConfig) -> ChatEncoder:
    """Asks a model in the chat format it was trained in. The loss is that of all assistant turns, whatever was trained.

    Raises:
        ConfigError: the configuration wants another format than the model was trained in.
        TokenizerError: the model's tokenizer can't be used.
    """
    trained, asked = ChatRules.load(model_dir), ChatRules()
    if config.chat_format is not None:
        format_, table, date = config.chat_format, config.chat_table, config.template_date
        asked = ChatRules(chat_format=format_, chat_table=table, template_date=date)
        if trained is not None and (trained.chat_format, trained.chat_table, trained.template_date) != (format_, table, date):
            raise ConfigError(
                f"config.chat_format {format_!r}, its table and its date are not what the model was trained with "
                f"({trained.chat_format!r}, see {model_dir / RULES_FILE}); leave them out to ask it as it was trained"
            )
    return ChatEncoder(Tokenizer.load(model_dir), asked if trained is None else trained.written_alike())


def _report(
    config: EvalConfig, scored: tuple[EvalRow, ...], losses: Sequence[tuple[float, int]], timings: dict[str, float]
) -> EvalReport:
    num_correct = sum(row.correct for row in scored)
    held_out = pooled(losses)
    return EvalReport(
        verifier=config.verifier,
        accuracy=num_correct / len(scored),
        confidence=config.confidence,
        interval=wilson_interval(num_correct, len(scored), config.confidence),
        num_eval=len(scored),
        num_correct=num_correct,
        num_cut=sum(row.stop_reason == "length" for row in scored),
        loss=held_out.loss,
        num_loss_rows=held_out.num_rows,
        num_loss_tokens=held_out.num_targets,
        num_not_finite=held_out.num_not_finite,
        rows=scored,
        timings=timings,
    )


@dataclass
class _Run:
    """What both parts of an evaluation need, and how far they are."""

    model_dir: Path
    config: EvalConfig
    shape: ClusterShape
    group_factory: GroupFactory
    progress: Progress
    num_done: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    def add(self, count: int) -> None:
        self.num_done += count
        self.progress(self.num_done)

    def hear(self, events: list[Event]) -> None:
        self.add(sum(event["finished"] for event in events))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.timings[f"{part}_seconds"] = time.monotonic() - started


def _generate(run: _Run, prompts: list[list[int]], params: SamplingParams) -> list[Generation]:
    """Answers of engines that live for this call."""
    config, shape = run.config, run.shape
    env = cpu_environment(shape.threads_per_rank) | engine_environment()
    with ExitStack() as stack:
        with run.timed("engine_start"):
            group = run.group_factory(EngineWorker, shape, env=env, deadlines=Deadlines(), process_group=False)
            engines = EnginePool(stack.enter_context(group), config.deadline_seconds)
            engines.open(
                run.model_dir,
                read_manifest(run.model_dir).digest,
                dtype="float32" if shape.device == "cpu" else "auto",
                max_len=max(map(len, prompts)) + params.max_new_tokens,
                kv_cache_gib=config.kv_cache_gib,
            )
        with run.timed("generate"):
            return engines.generate(prompts, params, run.add)


def _measure_loss(run: _Run, rows: Sequence[Encoded], pad_id: int) -> list[tuple[float, int]]:
    """(negative log-likelihood, targets) of each row, from ranks that start after the engines have gone."""
    shape = run.shape
    if shape.device == "cpu":  # threads of one rank share the weights
        shape = shape.model_copy(update={"ranks_per_node": 1, "threads_per_rank": shape.num_ranks * shape.threads_per_rank})
    num_ranks = shape.num_ranks
    shares = [[asdict(row) for row in rows[rank::num_ranks]] for rank in range(num_ranks)]
    env = cpu_environment(shape.threads_per_rank)
    seconds = run.config.deadline_seconds
    with (
        run.timed("loss"),
        run.group_factory(LossWorker, shape, env=env, deadlines=Deadlines(), process_group=False) as group,
    ):
        same = [[value] * num_ranks for value in (run.model_dir, TOKENS_PER_PACK, pad_id)]
        found = group.call("measure", shares, *same, deadline_seconds=seconds, on_events=run.hear)
    ordered = [found[index % num_ranks][index // num_ranks] for index in range(len(rows))]
    return [(loss, int(count)) for loss, count in ordered]


def _cpu_shape(config: EvalConfig) -> ClusterShape:
    return ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=config.engines, threads_per_rank=config.engine_threads)

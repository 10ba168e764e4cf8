"""Scoring output heads on held-out rows, with the losses that train them."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from lib.cluster.group import Deadlines, Event, GroupFactory, Worker, dispatch
from lib.config.evaluation import HeadsEvalConfig, HeadsEvalJob
from lib.core.errors import DataError
from lib.core.examples import Completion, Conversation
from lib.core.manifest import Json
from lib.data.document import Document, PackedRow
from lib.data.examples import labelled_kind, open_examples
from lib.data.mixture import OWN_DATA
from lib.data.schemas.arrow import TYPE_OF
from lib.data.tokenize import encoding_of
from lib.evals.heads import HeadScore, HeadsReport
from lib.evals.loss import packs
from lib.models.heads import HeadedDecoder
from lib.models.hf_io import read_spec
from lib.parallel.load import load_heads, load_sharded
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from lib.train.environment import cpu_environment
from lib.train.heads import HeadsLossModule, HeadsObjective, heads_micro_batch

TOKENS_PER_PACK, CHUNK_TOKENS = 2048, 1024
"""Change speed and memory, not the result."""
DEADLINE_SECONDS = 3600.0


class HeadsEvalWorker(Worker):
    """One rank: a whole model and a share of the rows, in float32."""

    @dispatch(merge="sum", events="all")
    @torch.no_grad()
    def measure(self, job_values: Json, max_rows: int, model_dir: Path, data_dir: Path) -> dict[str, float]:
        """Sums over this rank's share of the first `max_rows` rows: those of the objective as "sum/<name>", what divides them
        as "divisor/<name>", and "rows", "tokens" and "targets" of the next token. A row with a sum that isn't finite is in none
        of these, but counted as "not_finite". Rows done are events {"finished": n}."""
        job = HeadsEvalJob.parse(job_values, where="job")
        encoder, objective = ChatEncoder.of(Tokenizer.load(model_dir), job.chat), HeadsObjective(job.outputs)
        device = torch.device(self.info.device)
        _, spec = read_spec(model_dir)
        with torch.device("meta"):
            module = HeadsLossModule(HeadedDecoder(spec, job.outputs), CHUNK_TOKENS)
        load_sharded(module, model_dir, device)
        load_heads(module, model_dir, seed=job.seed)
        found = Counter({f"{kind}/{head.name}": 0.0 for head in job.outputs.heads for kind in ("sum", "divisor")})

        def add(pack: PackedRow) -> None:
            micro = heads_micro_batch([pack], pack.num_tokens, encoder.tokenizer.pad_id, job.outputs)
            sums = {f"sum/{name}": value.item() for name, value in objective.sums(module, micro, device).items()}
            if not all(map(math.isfinite, sums.values())):  # one document's, which spoils its neighbours: see lib/evals/loss.py
                if len(pack.documents) == 1:
                    found.update(not_finite=1)
                else:
                    for document in pack.documents:
                        add(PackedRow((document,)))
                return
            found.update(sums)
            found.update({f"divisor/{name}": value for name, value in objective.divisors(micro).items()})
            found.update(rows=len(pack.documents), tokens=pack.num_tokens, targets=micro.batch.num_targets)

        for pack in packs(self._documents(encoder, data_dir, max_rows, longest=spec.max_positions), TOKENS_PER_PACK):
            add(pack)
            self.emit({"finished": len(pack.documents)})
        return dict(found)

    def _documents(self, encoder: ChatEncoder, data_dir: Path, max_rows: int, *, longest: int) -> list[Document]:
        kind = labelled_kind(data_dir)
        source = open_examples(data_dir, TYPE_OF[kind], kind=kind)
        rows = (row.example for split in range(source.num_splits) for row in source.read(split))
        mine: list[Conversation | Completion] = list(islice(rows, self.info.rank, max_rows, self.info.num_ranks))
        documents = list(encoding_of(encoder, {OWN_DATA: source}, kind).encode(mine)) if mine else []
        for row, document in zip(mine, documents):
            if len(document.token_ids) > longest:
                place = f"{getattr(row, 'source', '')}: row {document.sample_id!r}"
                raise DataError(f"{place} has {len(document.token_ids)} tokens, the model has positions for {longest}")
        return documents


def run_heads_evaluation(
    model_dir: Path,
    data_dir: Path,
    job: HeadsEvalJob,
    config: HeadsEvalConfig,
    *,
    group_factory: GroupFactory,
    progress: Callable[[int], None],
) -> HeadsReport:
    """Score a model artifact on the first `config.max_rows` rows of a data-set artifact. Heads that the model lacks are as a
    training would begin with them.

    Args:
        progress: called with the number of rows done.
    Raises:
        DataError: a row's labels don't fit the heads, or it is too long; names the row.
        ModelError: the model has a head that the job lacks, or has for other outputs.
        WorkerDiedError: a rank died.
    """
    done = 0

    def hear(events: list[Event]) -> None:
        nonlocal done
        done += sum(event["finished"] for event in events)
        progress(done)

    env = cpu_environment(job.shape.threads_per_rank)
    with group_factory(HeadsEvalWorker, job.shape, env=env, deadlines=Deadlines(), process_group=False) as group:
        arguments = (job.model_dump(mode="json"), config.max_rows, model_dir, data_dir)
        found = Counter(group.call("measure", *arguments, deadline_seconds=DEADLINE_SECONDS, on_events=hear))
    sums, divisors = (
        {name.partition("/")[2]: value for name, value in found.items() if name.startswith(kind)}
        for kind in ("sum/", "divisor/")
    )
    figures = HeadsObjective(job.outputs).figures(sums, divisors, num_targets=int(found["targets"]))
    scores = tuple(
        HeadScore(
            name=head.name,
            loss=figures[f"loss/{head.name}"],
            num_targets=figures[f"targets/{head.name}"],
            accuracy=figures.get(f"accuracy/{head.name}"),
        )
        for head in job.heads
    )
    loss = HeadsObjective(job.outputs).loss(sums, divisors)
    counts = {f"num_{name}": int(found[name]) for name in ("rows", "tokens", "not_finite")}
    return HeadsReport(loss=loss, heads=scores, **counts)

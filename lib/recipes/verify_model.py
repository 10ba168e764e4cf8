"""What a checkpoint folder must show from end to end: logits, continuations, its way out, and vLLM reading what came out.

A folder of no family here is computed by transformers itself: it shows what can go wrong then, and the rest is named as not
proven.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lib.cluster.group import Deadlines, GroupFactory
from lib.config.parallel import ClusterShape
from lib.core.errors import GenerationError
from lib.evals.workers import EnginePool, EngineWorker
from lib.models.decoder import Decoder
from lib.models.hf_export import write_hf_folder
from lib.models.hf_fallback import FallbackModel, check_fallback, different_tensors, is_fallback, load_fallback
from lib.models.hf_io import CheckpointReader, checked_weight_map, load_full, read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.logit_report import Divergence
from lib.models.mxfp4 import decode_folder, is_mxfp4
from lib.models.verify import PROBE_TEXTS, build_logit_report, transformers_quiet
from lib.models.verify_fallback import fallback_report
from lib.rollout.engine import engine_environment
from lib.rollout.types import SamplingParams
from lib.tokens.tokenizer import Tokenizer
from lib.train.environment import cpu_environment

LOGPROB_LIMIT = 1e-4
"""Of a token's log-probability in vLLM, in float32, against ours."""


@dataclass(frozen=True)
class ModelCheck:
    """Figures of one folder; `problems` is empty where all is well."""

    family: str
    """"transformers" where it is of none here."""
    configs: int
    """Random models of the family that were compared; none where there is no family."""
    max_logit_diff: float
    """The checkpoint's, relative to its greatest |logit| (a classifier's last hidden states in their place): ours to
    transformers'; without a family, transformers' fast attention to its plain one."""
    packed_diff: float
    """Of documents packed, to each alone, relative likewise; without a family, of padded documents in rows of their own."""
    own_dtype_error: float
    """See lib/models/logit_report.py."""
    greedy_tokens: int
    """Of all continuations together; transformers writes the same ones."""
    tensors: int
    """That came back from a round trip with their bits, names and dtypes."""
    vllm_logprob_diff: float | None
    """None of a classifier, and where vLLM can't run a model without a family; then `not_proven` says why."""
    problems: tuple[str, ...]
    not_proven: tuple[str, ...]
    """What this check doesn't tell of the folder, though it does of one of a family, and why."""
    first_difference: Divergence | None
    """Of the first model that differs."""

    def to_json(self) -> dict[str, Any]:
        where = self.first_difference
        return {**asdict(self), "first_difference": where and where.model_dump()}


@dataclass(frozen=True)
class _Opened:
    """A folder's model, and what was found out about it before it is asked to continue texts."""

    model: Decoder | FallbackModel
    figures: dict[str, Any]
    """Of the ModelCheck."""
    problems: list[str]
    not_proven: list[str]


def check_model(
    folder: Path, work_dir: Path, *, group_factory: GroupFactory, num_configs: int = 40, num_tokens: int = 16
) -> ModelCheck:
    """Compare a folder with transformers and vLLM, in float32 on CPU.

    Args:
        folder: where its weights are in MXFP4, they are decoded first.
        work_dir: an existing empty folder, for what is decoded and exported.
        num_configs: random models of the family to compare, where it has one.
        num_tokens: length of each greedy continuation.
    Raises:
        ModelError: the folder can be read neither as a known family nor by transformers.
        GenerationError: vLLM can't run the export of a known family.
    """
    export, decoded = work_dir / "export", work_dir / "decoded"
    export.mkdir()
    if is_mxfp4(folder):
        decoded.mkdir()
        decode_folder(folder, decoded)
        folder = decoded
    tokenizer = Tokenizer.load(folder)
    prompts = [tokenizer.encode(text) for text in PROBE_TEXTS]
    opened = _open_fallback(folder, export) if is_fallback(folder) else _open_family(folder, export, num_configs)
    num_written, difference = 0, None
    if opened.model.spec.lm_head:
        num_written, difference = _continue(opened, folder, export, prompts, num_tokens, group_factory)
    else:
        opened.not_proven.append("continuations and generation in vLLM: a sequence classifier writes no tokens")
    return ModelCheck(
        **opened.figures,
        greedy_tokens=num_written,
        vllm_logprob_diff=difference,
        problems=tuple(opened.problems),
        not_proven=tuple(opened.not_proven),
    )


def _continue(
    opened: _Opened,
    folder: Path,
    export: Path,
    prompts: list[list[int]],
    num_tokens: int,
    group_factory: GroupFactory,
) -> tuple[int, float | None]:
    """(tokens that were written, difference to vLLM's log-probabilities); what is wrong with them is added to the problems."""
    ours = [greedy(lambda ids: _logits(opened.model, ids), prompt, num_tokens) for prompt in prompts]
    theirs = _greedy_of_transformers(folder, prompts, num_tokens)
    if ours != theirs:
        opened.problems.append(f"greedy continuations differ from transformers': {ours} and {theirs}")
    difference = None
    try:
        difference = _vllm_difference(opened.model, export, prompts, num_tokens, group_factory)
        if not difference <= LOGPROB_LIMIT:
            opened.problems.append(f"vLLM's log-probabilities differ by {difference:.3g} > {LOGPROB_LIMIT}")
    except GenerationError as error:
        if isinstance(opened.model, Decoder):
            raise
        opened.not_proven.append(f"generation in vLLM, which evaluation during training needs: {error}")
    return sum(len(tokens) for tokens in ours), difference


def _open_family(folder: Path, export: Path, num_configs: int) -> _Opened:
    report = build_logit_report(folder, num_configs=num_configs)
    checkpoint = report.checkpoint
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    num_tensors, lost = round_trip(decoder, folder, export)
    figures = {
        "family": report.family,
        "configs": report.num_configs,
        "max_logit_diff": checkpoint.logit_diff / checkpoint.max_logit,
        "packed_diff": checkpoint.packed_diff / checkpoint.max_logit,
        "own_dtype_error": checkpoint.own_dtype_error,
        "tensors": num_tensors - len(lost),
        "first_difference": next(
            (case.first_difference for case in (*report.cases, checkpoint) if case.first_difference), None
        ),
    }
    return _Opened(decoder, figures, [*report.problems, *_not_back(lost)], [])


def _open_fallback(folder: Path, export: Path) -> _Opened:
    check_fallback(folder)
    report = fallback_report(folder, export=export)
    with transformers_quiet():
        model = load_fallback(folder)
    lost = different_tensors(folder, export)
    not_proven = ["its numbers: transformers' own code computes it, and there is no second code to compare with"]
    if report.packing_problem:
        not_proven.append(f"several documents in a row ({report.packing_problem}): set config.data.packing: pad")
    if report.adapter_problem:
        not_proven.append(f"adapters ({report.adapter_problem}): leave config.model.lora out")
    figures = {
        "family": report.family,
        "configs": 0,
        "max_logit_diff": report.checkpoint.logit_diff,
        "packed_diff": report.packed_diff,
        "own_dtype_error": 0.0,
        "tensors": len(CheckpointReader(folder).names()) - len(lost),
        "first_difference": None,
    }
    return _Opened(model, figures, list(report.problems), not_proven)


def _not_back(lost: list[str]) -> list[str]:
    return [f"{name} did not come back from a round trip" for name in lost]


@torch.no_grad()
def greedy(logits_of: Callable[[torch.Tensor], torch.Tensor], prompt: list[int], num_tokens: int) -> list[int]:
    """The most probable continuation; `logits_of` maps [T] ids to [T, V] logits."""
    ids = torch.tensor(prompt)
    for _ in range(num_tokens):
        ids = torch.cat([ids, logits_of(ids)[-1].argmax()[None]])
    return [int(token) for token in ids[len(prompt) :]]


def _reference(folder: Path) -> Any:
    """Transformers' model, with the attention that its equations say."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
    ).eval()


def _greedy_of_transformers(folder: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    reference = _reference(folder)
    return [greedy(lambda ids: reference(ids[None], use_cache=False).logits[0], prompt, num_tokens) for prompt in prompts]


def round_trip(decoder: Decoder, folder: Path, out: Path) -> tuple[int, list[str]]:
    """Write the decoder to `out` as the folder stores it; (number of tensors, names of those that aren't the same bits)."""
    reader = CheckpointReader(folder)
    weights = checked_weight_map(reader, *read_spec(folder))
    write_hf_folder(out, weights.to_checkpoint(decoder.named_parameters()), folder)
    written = CheckpointReader(out)
    names = sorted(weights.stored_shapes())
    return len(names), [name for name in names if not _same_bits(reader.get(name), written.get(name))]


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _logits(model: Decoder | FallbackModel, ids: torch.Tensor) -> torch.Tensor:
    """[T, V] of one text."""
    layout = DocumentLayout.from_document_ids(torch.zeros(1, len(ids)))
    found: torch.Tensor = model(ids[None], torch.arange(len(ids))[None], layout)
    return (model.logits(found) if isinstance(model, Decoder) else found)[0]


@torch.no_grad()
def _vllm_difference(
    model: Decoder | FallbackModel, folder: Path, prompts: list[list[int]], num_tokens: int, group_factory: GroupFactory
) -> float:
    """Greatest difference of the log-probabilities of the tokens that vLLM wrote, to ours and to those of our best tokens."""
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=1, threads_per_rank=1)
    env = cpu_environment(shape.threads_per_rank) | engine_environment()
    with group_factory(EngineWorker, shape, env=env, deadlines=Deadlines(), process_group=False) as group:
        engines = EnginePool(group, deadline_seconds=600.0)
        longest = max(map(len, prompts)) + num_tokens
        engines.open(folder, "checked", dtype="float32", max_len=longest, kv_cache_gib=0.25)
        generations = engines.generate(prompts, SamplingParams(max_new_tokens=num_tokens, stop_ids=()))
    worst = 0.0
    for generation in generations:
        ids = torch.tensor([*generation.prompt_ids, *generation.token_ids])
        logprobs_TV = _logits(model, ids).log_softmax(-1)[len(generation.prompt_ids) - 1 : -1]
        chosen_T = logprobs_TV.gather(-1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        worst = max(worst, float((chosen_T - torch.tensor(generation.logprobs)).abs().max()))
        worst = max(worst, float((logprobs_TV.amax(-1) - chosen_T).max()))
    return worst

"""The logit report: a family computes what transformers computes, on random models of the family and on a checkpoint.

Everything is float32. The reference sees each document alone, without cache and without mask, so that nothing about
packing can be wrong on its side; ours sees the documents packed and alone. Of a sequence classifier, which gives no logits of
tokens, the last hidden states are compared in their place. Letters: L tokens of a document, V vocabulary, D model.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lib.models.decoder import Decoder
from lib.models.divergence import first_divergence
from lib.models.hf_io import CheckpointReader, load_full, read_json, read_spec
from lib.models.layers.documents import PADDING, DocumentLayout
from lib.models.logit_report import GRAD_LIMIT, LOGIT_LIMIT, SMALL_GRADIENT, CaseResult, LogitReport
from lib.models.spec import DecoderSpec
from lib.models.verify_configs import MemoryCheckpoint, RandomCase, checkpoint_names, describe, random_case, random_model
from lib.tokens.tokenizer import Tokenizer

PROBE_TEXTS = (
    "The sum of 12 and 30 is 42. Ein Satz mit Umlauten: äöü.",
    "def add(a, b):\n    return a + b\n",
    "What is 7 times 6? State the final answer as a number.",
)


def build_logit_report(
    folder: Path, *, num_configs: int = 40, seed: int = 0, progress: Callable[[int], None] | None = None
) -> LogitReport:
    """Compare `num_configs` random models of the folder's family, then the folder itself, with transformers.

    Args:
        progress: called with the number of comparisons done, up to num_configs + 1.
    Raises:
        ModelError: the folder can't be read as a known family at all. A difference is a report that has not passed.
    """
    family, _ = read_spec(folder)
    results = []
    with transformers_quiet():
        for index in range(num_configs):
            results.append(compare_random(random_case(family.name, seed, index), seed + index))
            if progress:
                progress(index + 1)
        checkpoint = compare_checkpoint(folder, seed)
    if progress:
        progress(num_configs + 1)
    problems = [problem for result in [*results, checkpoint] for problem in result.problems()]
    return LogitReport(
        family=family.name,
        seed=seed,
        num_configs=num_configs,
        max_logit_diff=max((result.logit_diff for result in results), default=0.0),
        max_grad_diff=max((result.grad_diff or 0.0 for result in results), default=0.0),
        packed_diff=max((result.packed_diff for result in results), default=0.0),
        cases=results,
        checkpoint=checkpoint,
        limits={"logit": LOGIT_LIMIT, "gradient": GRAD_LIMIT},
        problems=problems,
        passed=not problems,
    )


@contextmanager
def transformers_quiet() -> Iterator[None]:
    """Without its advice on odd configurations, which are drawn on purpose, and its own bars beside ours."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def compare_random(case: RandomCase, seed: int) -> CaseResult:
    """Compare a random model: logits, gradients, packing, and whether documents see each other."""
    generator = torch.Generator().manual_seed(seed)
    reference, decoder = random_model(case, generator)
    documents = random_documents(generator, decoder.spec.vocab_size, (1, 23, 70, 12, 8))
    reference_loss, ours_loss = torch.zeros(()), torch.zeros(())
    packed = _packed_logits(decoder, documents)
    expected = [reference(ids[None], use_cache=False).logits[0] for ids in documents]
    for ids, theirs, ours in zip(documents, expected, packed):
        targets = ids.roll(1)
        reference_loss = reference_loss + cross_entropy(theirs, targets, reduction="sum")
        ours_loss = ours_loss + cross_entropy(ours, targets, reduction="sum")
    torch.autograd.backward([reference_loss, ours_loss])
    gradients = {name: _gradient(parameter) for name, parameter in reference.named_parameters()}
    weights, expected_gradients = case.family.weight_map(case.spec), MemoryCheckpoint(checkpoint_names(reference, gradients))
    small = SMALL_GRADIENT * greatest([float(gradient.abs().max()) for gradient in gradients.values()])
    grad_diffs = {
        name: _relative(ours.grad, weights.read(expected_gradients, name), small) for name, ours in decoder.named_parameters()
    }
    result = _result(describe(case), decoder, documents, expected, packed, grad_diff=greatest(list(grad_diffs.values())))
    if not result.problems():
        return result
    where = first_divergence(case.family.weight_names, reference, decoder, documents[2])
    worst = max(grad_diffs, key=lambda name: (math.isnan(grad_diffs[name]), grad_diffs[name]))
    where = where.model_copy(update={"gradient": worst})
    return result.model_copy(update={"first_difference": where})


@torch.no_grad()
def compare_checkpoint(folder: Path, seed: int) -> CaseResult:
    """Compare a folder's own weights, on random ids and on text: logits, or a classifier's last hidden states."""
    family, spec = read_spec(folder)
    tokenizer = Tokenizer.load(folder)
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.tensor(tokenizer.encode(text)) for text in PROBE_TEXTS]
    documents = [*random_documents(generator, min(spec.vocab_size, tokenizer.vocab_size), (24,)), *texts]
    kind = AutoModelForCausalLM if spec.lm_head else AutoModelForSequenceClassification
    reference = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
    ).eval()
    expected = [_outputs(reference, ids, spec) for ids in documents]
    with torch.device("meta"):
        decoder = Decoder(spec)
    load_full(decoder, folder)
    name = str(read_json(folder / "config.json").get("_name_or_path") or "the checkpoint")
    result = _result(name, decoder, documents, expected, _packed_logits(decoder, documents), grad_diff=None)
    if result.problems():
        where = first_divergence(family.weight_names, reference, decoder, documents[0])
        return result.model_copy(update={"first_difference": where})
    return result.model_copy(update={"own_dtype_error": _own_dtype_error(folder, reference, documents, expected)})


def _own_dtype_error(
    folder: Path, reference: PreTrainedModel, documents: list[torch.Tensor], expected: list[torch.Tensor]
) -> float:
    """Error of ours over error of the reference, both medians: a token whose experts flip says nothing of rounding."""
    family, spec = read_spec(folder)
    dtype = CheckpointReader(folder).dtype(family.weight_map(spec).entries["embed.weight"].names[0])
    if dtype == torch.float32:
        return 0.0
    with torch.device("meta"):
        decoder = Decoder(spec)
    load_full(decoder, folder, dtype)
    reference = reference.to(dtype)
    theirs = [_outputs(reference, ids, spec) for ids in documents]
    return _error(_packed_logits(decoder, documents), expected) / max(_error(theirs, expected), 1e-30)


def _outputs(reference: PreTrainedModel, ids: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
    """[L, V] logits of the reference, [L, D] last hidden states where it is a classifier."""
    if not spec.lm_head:
        hidden: torch.Tensor = reference.base_model(ids[None], use_cache=False).last_hidden_state[0]
        return hidden
    logits: torch.Tensor = reference(ids[None], use_cache=False).logits[0]
    return logits


def _error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return float(torch.cat([(a.float() - b).flatten() for a, b in zip(found, expected)]).abs().median())


@torch.no_grad()
def _result(
    model: str,
    decoder: Decoder,
    documents: list[torch.Tensor],
    expected: list[torch.Tensor],
    packed: list[torch.Tensor],
    *,
    grad_diff: float | None,
) -> CaseResult:
    alone = [_packed_logits(decoder, [ids])[0] for ids in documents]
    max_logit = max(float(logits.abs().max()) for logits in expected)
    return CaseResult(
        model=model,
        max_logit=max_logit,
        logit_limit=LOGIT_LIMIT if grad_diff is not None else LOGIT_LIMIT * max_logit,
        logit_diff=greatest([_distance(packed, expected), _distance(alone, expected)]),
        packed_diff=_distance(packed, alone),
        grad_diff=grad_diff,
        leaked=_count_leaks(decoder, documents, packed),
    )


def _packed_logits(decoder: Decoder, documents: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [L, V] of each document, all in one row with padding at the end (no padding where there is one document).

    Hidden states [L, D] of a decoder without head.
    """
    padding = 3 if len(documents) > 1 else 0
    fill = torch.zeros(padding, dtype=torch.int64)
    ids = [torch.full((len(tokens),), number) for number, tokens in enumerate(documents)]
    layout = DocumentLayout.from_document_ids(torch.cat([*ids, fill + PADDING])[None])
    positions = torch.cat([*(torch.arange(len(tokens)) for tokens in documents), fill])
    hidden = decoder(torch.cat([*documents, fill])[None], positions[None], layout)[0]
    logits = decoder.logits(hidden) if decoder.spec.lm_head else hidden
    return list(torch.split(logits, [*(len(tokens) for tokens in documents), padding])[: len(documents)])


def _count_leaks(decoder: Decoder, documents: list[torch.Tensor], packed: list[torch.Tensor]) -> int:
    """Change every token of every second document; count the logits of the others that are not the same bits."""
    changed = [(ids + 1) % decoder.spec.vocab_size if number % 2 else ids for number, ids in enumerate(documents)]
    again = _packed_logits(decoder, changed)
    return sum(int((before != after).sum()) for before, after in list(zip(packed, again))[::2])


def random_documents(generator: torch.Generator, vocab_size: int, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def greatest(values: list[float]) -> float:
    """The greatest; NaN if any is NaN, which Python's own max would drop unless it came first."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def _distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return float(torch.stack([(a - b).abs().max() for a, b in zip(left, right)]).max())


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _relative(ours: torch.Tensor | None, theirs: torch.Tensor, small: float) -> float:
    """Greatest difference in units of the reference's greatest |gradient|, or of `small`; infinite where ours is missing."""
    if ours is None:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=small))

"""The report that any model folder gets: by its family, or, where it has none, of what transformers makes of its documents."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from lib.models.fallback_lora import adapter_problem
from lib.models.hf_fallback import (
    FAMILY,
    compare_documents,
    difference_to_plain,
    is_fallback,
    load_fallback,
    lost_in_round_trip,
    packing_problem,
)
from lib.models.logit_report import GRAD_LIMIT, LOGIT_LIMIT, CaseResult, LogitReport
from lib.models.verify import build_logit_report, random_documents, transformers_quiet


def verify_folder(folder: Path, *, progress: Callable[[int], None] | None = None) -> LogitReport:
    """See `build_logit_report`; a folder of no family is compared with itself, document by document."""
    return fallback_report(folder) if is_fallback(folder) else build_logit_report(folder, progress=progress)


def fallback_report(folder: Path, seed: int = 0, *, export: Path | None = None) -> LogitReport:
    """Of a model that transformers computes: its fast attention is its plain one, documents in rows of their own are as alone,
    and a round trip loses no bit.

    Args:
        export: an existing empty folder that keeps what the round trip writes.
    """
    with transformers_quiet(), tempfile.TemporaryDirectory() as scratch:
        model = load_fallback(folder)
        generator = torch.Generator().manual_seed(seed)
        documents = random_documents(generator, model.spec.vocab_size, (23, 37, 12, 8, 1))
        to_plain = difference_to_plain(model, folder, documents)
        difference, leaked = compare_documents(model, documents, packed=False)
        lost = lost_in_round_trip(folder, export or Path(scratch))
        packing, adapters = packing_problem(folder), adapter_problem(folder, seed)
        if not packing:
            packed, packed_leaked = compare_documents(model, documents, packed=True)
            packing = (
                f"logits differ by {packed:.3g}, {packed_leaked} leak" if packed_leaked or not packed <= LOGIT_LIMIT else ""
            )
    checkpoint = CaseResult(
        model="the checkpoint, as transformers computes it",
        max_logit=1.0,
        logit_limit=LOGIT_LIMIT,
        logit_diff=to_plain,
        packed_diff=difference,
        grad_diff=None,
        leaked=leaked,
    )
    problems = checkpoint.problems() + [f"{name} did not come back from a round trip" for name in lost]
    return LogitReport(
        family=FAMILY,
        seed=seed,
        num_configs=0,
        max_logit_diff=0.0,
        max_grad_diff=0.0,
        packed_diff=difference,
        cases=[],
        checkpoint=checkpoint,
        limits={"logit": LOGIT_LIMIT, "gradient": GRAD_LIMIT},
        problems=problems,
        passed=not problems,
        packing_problem=packing,
        adapter_problem=adapters,
    )

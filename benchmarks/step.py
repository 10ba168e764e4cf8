"""A training step by itself: ours against transformers and TRL at the same documents, forward, backward and AdamW, one thread.

`python -m benchmarks step [--rounds 2] [--tokens 4096] [--row 4096] [--trl-steps 4]`

One factor at a time: ours and transformers (`hf`), each packed (4,096 slots a micro-batch) and padded (8 documents padded to
the longest), in float32 and in bfloat16; all four project trained positions only. `ours_compiled` is ours packed with
`compile: layer`. `plain_loop` is what most people write: padded, all logits, one loss over them. `trl_packed` is TRL's
SFTTrainer with bfd packing and its padding-free batches, its own steps timed by a callback. Useful tokens are those that are
no padding; the losses of all variants of a dtype agree or the benchmark stops. A random Llama of 31 M weights; half of each
document is trained. The rows are from the middle of a longer stream, so that none is empty because the documents end.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.floor import gemm_gflops, measure_floor
from benchmarks.report import Report, interleaved_cpu_seconds, medians, say
from lib.core.errors import UserError
from lib.core.examples import IGNORE_INDEX
from lib.data.batch import collate
from lib.data.document import Document, PackedRow
from lib.data.packing import plan_packs
from lib.models.decoder import Decoder
from lib.models.flops import FlopCounter
from lib.models.hf_io import load_full, read_spec
from lib.models.spec import DecoderSpec
from lib.parallel.compiled import compile_part
from lib.train.step import LossModule, MicroBatch, NextToken, accumulate_gradients

CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TOKENIZER = Path(".quickstart/smollm2")
PADDED_ROWS, PACKED_SLOTS = 8, 4096
PAD_ID = 2
MAX_GRAD_NORM, LEARNING_RATE = 1.0, 1e-5
TARGETS = {
    "tokens_per_cpu_s_vs_trl_packed": 2.0,
    "tokens_per_cpu_s_vs_plain_loop": 1.5,
    "packed_share_of_ideal": 0.9,
    "share_of_fp32_ceiling": 0.85,
    "share_of_bf16_ceiling": 0.55,
}
Step = Callable[[], float]


def make_rows(num_rows: int, row: int) -> list[PackedRow]:
    """Packed random tokens of log-normal lengths (mean 128, sigma 1), the second half of each document trained."""
    source = np.random.default_rng(0)
    lengths = np.clip(source.lognormal(np.log(128) - 0.5, 1.0, (num_rows + 8) * row // 64), 4, row).astype(int)
    ids = [source.integers(3, CONFIG["vocab_size"], length).astype(np.int32) for length in lengths]
    documents = [Document(f"d{number}", own, np.arange(len(own)) >= len(own) // 2) for number, own in enumerate(ids)]
    plan = plan_packs(lengths, row, open_packs=16, max_delay=1024)
    bounds = list(zip(plan.offsets[:-1].tolist(), plan.offsets[1:].tolist()))[4 : 4 + num_rows]
    return [PackedRow(tuple(documents[index] for index in plan.order[start:stop])) for start, stop in bounds]


def packed(rows: Sequence[PackedRow], row: int) -> list[MicroBatch]:
    """PACKED_SLOTS a micro-batch."""
    at_once = max(1, PACKED_SLOTS // row)
    groups = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
    return [MicroBatch.of(collate(group, row, PAD_ID)) for group in groups]


def documents_of(rows: Sequence[PackedRow]) -> list[Document]:
    return [document for row in rows for document in row.documents]


def padded(packed_rows: Sequence[PackedRow]) -> list[MicroBatch]:
    """Eight documents a micro-batch, in the order in which they came."""
    documents = sorted(documents_of(packed_rows), key=lambda document: int(document.sample_id[1:]))
    found = []
    for start in range(0, len(documents), PADDED_ROWS):
        rows = [PackedRow((document,)) for document in documents[start : start + PADDED_ROWS]]
        found.append(MicroBatch.of(collate(rows, max(row.num_tokens for row in rows), PAD_ID)))
    return found


def our_step(module: LossModule, micro_batches: Sequence[MicroBatch]) -> Step:
    num_targets = sum(micro.batch.num_targets for micro in micro_batches)

    def backward() -> float:
        divisors, device = {"loss": float(num_targets)}, torch.device("cpu")
        return accumulate_gradients(module, micro_batches, NextToken(), divisors=divisors, device=device)["loss"] / num_targets

    return _with_optimizer(module, backward)


def hf_step(model: LlamaForCausalLM, micro_batches: Sequence[MicroBatch], *, all_logits: bool = False) -> Step:
    """Labels are those of our batch, already shifted; positions tell transformers where packed documents begin."""
    num_targets = sum(micro.batch.num_targets for micro in micro_batches)

    def backward() -> float:
        total = 0.0
        for micro in micro_batches:
            batch = micro.batch
            is_packed = max(len(ids) for ids in batch.sample_ids) > 1
            where: dict[str, Any] = (
                {"position_ids": batch.positions} if is_packed else {"attention_mask": (batch.document_ids >= 0).long()}
            )
            if all_logits:
                logits = model(input_ids=batch.token_ids, use_cache=False, **where).logits
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
                )
            else:
                hidden = model.model(input_ids=batch.token_ids, use_cache=False, **where).last_hidden_state
                kept = batch.labels != IGNORE_INDEX
                logits = model.lm_head(hidden[kept]).float()
                loss = torch.nn.functional.cross_entropy(logits, batch.labels[kept], reduction="sum")
            (loss / num_targets).backward()
            total += float(loss)
        return total / num_targets

    return _with_optimizer(model, backward)


def _with_optimizer(module: torch.nn.Module, backward: Step) -> Step:
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        return loss

    return step


class _StepTimer(TrainerCallback):  # type: ignore[misc]
    """CPU seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._began)


def trl_tokens_per_second(folder: Path, rows: Sequence[PackedRow], options: argparse.Namespace, scratch: Path) -> float:
    """Useful tokens a CPU second of SFTTrainer's steps but the first; `rows` are those of all steps."""
    documents, at_once = documents_of(rows), max(1, PACKED_SLOTS // options.row)
    examples = {
        "input_ids": [document.token_ids.tolist() for document in documents],
        "labels": [np.where(document.loss_mask, document.token_ids, IGNORE_INDEX).tolist() for document in documents],
    }
    timer = _StepTimer()
    trainer = SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(scratch),
            use_cpu=True,
            bf16=False,
            packing=True,
            packing_strategy="bfd",
            max_length=options.row,
            shuffle_dataset=False,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=math.ceil(options.tokens / options.row / at_once),
            gradient_checkpointing=False,
            max_steps=options.trl_steps,
            learning_rate=LEARNING_RATE,
            optim="adamw_torch_fused",
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=datasets.Dataset.from_dict(examples),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        callbacks=[timer],
    )
    trainer.train()
    seen = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    rates = [(after - before) / second for before, after, second in zip(seen, seen[1:], timer.seconds[1:])]
    return statistics.median(rates)


def step_flops(spec: DecoderSpec, micro_batches: Sequence[MicroBatch], *, with_padding: bool) -> int:
    """Of a step; padding goes through the linear layers, not through attention or the head."""
    num_slots = sum(micro.batch.token_ids.numel() for micro in micro_batches)
    lengths = [span.length for micro in micro_batches for span in micro.layout.spans]
    counter = FlopCounter(spec)
    return counter.step(
        num_tokens=num_slots if with_padding else sum(lengths),
        num_attention_products=counter.attention_products(lengths),
        num_targets=sum(micro.batch.num_targets for micro in micro_batches),
    )


def our_module(folder: Path, dtype: torch.dtype, *, compiled: bool = False) -> LossModule:
    decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    for part in (*decoder.layers, decoder.norm) if compiled else ():
        compile_part(part, on_gpu=False)
    return LossModule(decoder.to(dtype), chunk_tokens=1024)


def make_steps(folder: Path, rows: Sequence[PackedRow], row: int) -> dict[str, Step]:
    """Every variant with weights and moments of its own, from the same checkpoint."""

    def model(dtype: torch.dtype) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")

    single, half = torch.float32, torch.bfloat16
    return {
        "ours_packed": our_step(our_module(folder, single), packed(rows, row)),
        "ours_compiled": our_step(our_module(folder, single, compiled=True), packed(rows, row)),
        "ours_padded": our_step(our_module(folder, single), padded(rows)),
        "hf_packed": hf_step(model(single), packed(rows, row)),
        "hf_padded": hf_step(model(single), padded(rows)),
        "plain_loop": hf_step(model(single), padded(rows), all_logits=True),
        "ours_packed_bf16": our_step(our_module(folder, half), packed(rows, row)),
        "hf_packed_bf16": hf_step(model(half), packed(rows, row)),
    }


def shares_of_ceilings(folder: Path, rows: Sequence[PackedRow], row: int) -> dict[str, float]:
    """Of ours, packed: in a process with one model, as a run is, all rows in a step. Each ceiling is measured beside it."""
    useful = step_flops(read_spec(folder)[1], packed(rows, row), with_padding=False)
    shares = {}
    for name, dtype, compiled in (
        ("share_of_fp32_ceiling", torch.float32, True),
        ("share_of_fp32_ceiling_plain", torch.float32, False),
        ("share_of_bf16_ceiling", torch.bfloat16, False),
    ):
        step = our_step(our_module(folder, dtype, compiled=compiled), packed(rows, row))
        for _ in range(2):
            step()  # memory and code are there from the third step on
        seconds = medians(interleaved_cpu_seconds({name: step}, rounds=3))[name]
        shares[name] = useful / seconds / 1e9 / gemm_gflops(dtype)
    return shares


def check_losses(losses: dict[str, float]) -> float:
    """Greatest relative difference of a first loss from ours of the same dtype; stops if the work isn't the same."""
    expected = {name: losses["ours_packed_bf16" if name.endswith("bf16") else "ours_packed"] for name in losses}
    differences = {name: abs(loss - expected[name]) / expected[name] for name, loss in losses.items()}
    for name, difference in differences.items():
        if difference > (1e-2 if name.endswith("bf16") else 1e-5):
            raise UserError(f"{name} has another loss, so it does other work: {losses}")
    return max(difference for name, difference in differences.items() if not name.endswith("bf16"))


def main(arguments: Sequence[str]) -> None:
    """Race all variants and print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--row", type=int, default=4096)
    parser.add_argument("--trl-steps", type=int, default=4)
    options = parser.parse_args(arguments)
    floor = measure_floor()
    stream = make_rows(options.tokens // options.row * options.trl_steps, options.row)
    rows = stream[: options.tokens // options.row]
    num_tokens = sum(row.num_tokens for row in rows)
    with tempfile.TemporaryDirectory(prefix="postflyte-step-") as scratch:
        folder = Path(scratch) / "model"
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder)
        spec = read_spec(folder)[1]
        shares = shares_of_ceilings(folder, stream, options.row)
        steps = make_steps(folder, rows, options.row)
        difference = check_losses({name: step() for name, step in steps.items()})
        seconds = medians(interleaved_cpu_seconds(steps, rounds=options.rounds))
        say("  trl_packed")
        rates = {name: num_tokens / value for name, value in seconds.items()}
        rates["trl_packed"] = trl_tokens_per_second(folder, stream, options, Path(scratch) / "trl")
    layouts = {"packed": packed(rows, options.row), "padded": padded(rows)}
    work = {name: step_flops(spec, layout, with_padding=True) for name, layout in layouts.items()}
    ideal = work["padded"] / work["packed"]
    report = Report("step")
    report.ours = {
        "tokens_per_cpu_s": rates["ours_packed"],
        "tokens_per_cpu_s_bf16": rates["ours_packed_bf16"],
        "packed_share_of_ideal": rates["ours_packed"] / rates["ours_padded"] / ideal,
        "tokens_per_cpu_s_compiled": rates["ours_compiled"],
        **shares,
    }
    for peer in ("ours_padded", "hf_packed", "hf_padded", "plain_loop", "trl_packed"):
        report.peers[peer] = {"tokens_per_cpu_s": rates[peer]}
        report.compare("tokens_per_cpu_s", peer, smaller_is_better=False)
    report.peers["hf_packed"]["tokens_per_cpu_s_bf16"] = rates["hf_packed_bf16"]
    report.compare("tokens_per_cpu_s_bf16", "hf_packed", smaller_is_better=False)
    report.targets = TARGETS
    report.details = {
        "documents": len(documents_of(rows)),
        "tokens": num_tokens,
        "padded_rows": PADDED_ROWS,
        "slots": {name: sum(micro.batch.token_ids.numel() for micro in layout) for name, layout in layouts.items()},
        "ideal_packed_vs_padded": ideal,
        "max_relative_loss_difference": difference,
        "options": vars(options),
    }
    report.print(floor)

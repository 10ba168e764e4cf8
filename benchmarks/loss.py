"""Cross-entropy at a vocabulary of 151,936: ours against full logits, TRL's chunked kernel and torch's own.

One optimizer step's loss and both gradients, float32, one thread: CPU time at 1,024 positions, interleaved; peak memory
at 4,096 positions, a fresh process a variant. Half of the positions are trained. TRL's kernel is raced twice: on the
trained positions only, as TRL runs it on GPUs, and on all positions, as TRL 1.16 runs it on CPU. torch's
`linear_cross_entropy` runs once, with a cap on its time.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from benchmarks.floor import measure_floor
from benchmarks.report import Report, interleaved_cpu_seconds, medians, say
from lib.core.examples import IGNORE_INDEX
from lib.losses.cross_entropy import cross_entropy_sum

TIMED_POSITIONS, MEMORY_POSITIONS = 1024, 4096
HIDDEN_SIZE, VOCAB_SIZE = 896, 151_936
CHUNK_TOKENS = 128
CAP_SECONDS = 120.0
"""Longest wait for a variant that is not timed in rounds."""
MEMORY_CAP_SECONDS = 900.0
NOT_TIMED = ("torch_linear_cross_entropy",)

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(num_positions: int) -> Inputs:
    """hidden [positions, D], weight [V, D], labels [positions] of which half are trained."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_positions, HIDDEN_SIZE, generator=generator)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator) * 0.02
    labels = torch.randint(VOCAB_SIZE, (num_positions,), generator=generator)
    labels[torch.randperm(num_positions, generator=generator)[: num_positions // 2]] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy_sum(hidden, weight, labels, CHUNK_TOKENS).total


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum", ignore_index=IGNORE_INDEX)


def trl_trained(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    kept = labels != IGNORE_INDEX
    return -_trl(hidden[kept], weight, labels[kept]).sum()


def trl_all(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -_trl(hidden, weight, labels.clamp(min=0)).masked_fill(labels == IGNORE_INDEX, 0).sum()


def _trl(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    outputs = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    logprobs: torch.Tensor = outputs[0]
    return logprobs


def torch_linear(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    options = nn.LinearCrossEntropyOptions()
    return nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


VARIANTS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "ours": ours,
    "full_logits": full_logits,
    "trl_trained_positions": trl_trained,
    "trl_all_positions": trl_all,
    "torch_linear_cross_entropy": torch_linear,
}


def run(name: str, inputs: Inputs) -> None:
    hidden, weight, labels = inputs
    hidden.grad = weight.grad = None
    VARIANTS[name](hidden, weight, labels).backward()


def difference(name: str, inputs: Inputs) -> float:
    """Greatest difference of loss and gradients from full logits', each relative to its own greatest entry."""
    results = []
    for variant in (name, "full_logits"):
        hidden, weight, labels = inputs
        hidden.grad = weight.grad = None
        loss = VARIANTS[variant](hidden, weight, labels)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    return max(float((found - expected).abs().max() / expected.abs().max()) for found, expected in zip(*results))


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _measure_once(name: str, num_positions: int, results: Connection) -> None:
    """In a fresh process: peak memory above the inputs, and CPU seconds."""
    torch.set_num_threads(1)
    inputs = make_inputs(num_positions)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the library's own buffers
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    start = time.process_time()
    run(name, inputs)
    results.send((_status_bytes("VmHWM") - before, time.process_time() - start))


def fresh_process(name: str, num_positions: int, cap_seconds: float) -> tuple[int, float] | None:
    """(peak bytes, CPU seconds) of one run; None if it takes more than cap_seconds and is stopped."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_once, args=(name, num_positions, sender))
    process.start()
    sender.close()
    measured: tuple[int, float] | None = receiver.recv() if receiver.poll(cap_seconds) else None
    process.kill()
    process.join()
    return measured


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks loss")
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args(arguments).rounds
    floor = measure_floor()
    inputs = make_inputs(TIMED_POSITIONS)
    report = Report("loss")
    worst = max(difference(name, inputs) for name in ("ours", "trl_trained_positions"))
    timed = {name: (lambda name=name: run(name, inputs)) for name in VARIANTS if name not in NOT_TIMED}
    seconds = medians(interleaved_cpu_seconds(timed, rounds=rounds))
    for name in VARIANTS:
        figures = {"cpu_seconds": seconds[name]} if name in seconds else {}
        say(f"  {name}, in a fresh process")
        positions, cap = (MEMORY_POSITIONS, MEMORY_CAP_SECONDS) if name in seconds else (TIMED_POSITIONS, CAP_SECONDS)
        measured = fresh_process(name, positions, cap)
        if measured and name in seconds:
            figures["peak_bytes"] = float(measured[0])
        elif name not in seconds:
            figures["cpu_seconds"] = measured[1] if measured else CAP_SECONDS
            report.details[f"{name}_was_stopped"] = measured is None
        if name == "ours":
            report.ours = figures
        else:
            report.peers[name] = figures
    num_flops = 3 * 2 * (TIMED_POSITIONS // 2) * HIDDEN_SIZE * VOCAB_SIZE
    report.ours["share_of_gemm_ceiling"] = num_flops / report.ours["cpu_seconds"] / 1e9 / floor["fp32_gflops"]
    for peer, figures in report.peers.items():
        for figure in figures:
            report.compare(figure, peer, smaller_is_better=True)
    report.targets = {
        "cpu_seconds_vs_trl_trained_positions": 1.3,
        "peak_bytes_vs_trl_trained_positions": 1.0,
        "peak_bytes_vs_full_logits": 7.0,
    }
    report.details |= {
        "timed_positions": TIMED_POSITIONS,
        "memory_positions": MEMORY_POSITIONS,
        "trained_share": 0.5,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "chunk_tokens": CHUNK_TOKENS,
        "max_relative_difference": worst,
    }
    report.print(floor)

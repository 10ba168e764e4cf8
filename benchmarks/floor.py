"""The machine's ceilings, one thread: matrix products and memory copy. Others quote their share of these."""

import time
from collections.abc import Sequence

import torch

from benchmarks.report import Report, say


def gemm_gflops(dtype: torch.dtype, *, size: int = 1024, budget_seconds: float = 1.0) -> float:
    """Best rate of a size x size x size product, in 1e9 floating-point operations a CPU second."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    torch.mm(left, right, out=out)
    best, spent = float("inf"), 0.0
    while spent < budget_seconds:
        start = time.process_time()
        torch.mm(left, right, out=out)
        seconds = max(time.process_time() - start, 1e-9)
        best, spent = min(best, seconds), spent + seconds
    return 2.0 * size**3 / best / 1e9


def copy_gbytes(*, size_bytes: int = 256 << 20, repeats: int = 8) -> float:
    """Best rate of a copy, in 1e9 bytes read + written a CPU second."""
    source = torch.zeros(size_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        target.copy_(source)
        best = min(best, max(time.process_time() - start, 1e-9))
    return 2.0 * size_bytes / best / 1e9


def measure_floor() -> dict[str, float]:
    """All ceilings; takes about three seconds."""
    torch.set_num_threads(1)
    return {
        "fp32_gflops": gemm_gflops(torch.float32),
        "bf16_gflops": gemm_gflops(torch.bfloat16),
        "copy_gbytes_per_s": copy_gbytes(),
    }


def main(arguments: Sequence[str]) -> None:
    if arguments:
        raise SystemExit(f"floor takes no options, got {list(arguments)}")
    say("measuring matrix products and memory copy, one thread")
    floor = measure_floor()
    Report("floor", ours=floor).print(floor)

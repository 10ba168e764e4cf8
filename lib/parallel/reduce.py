"""Numbers over all ranks: sums, the gradient norm, and a barrier with a deadline."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lib.core.errors import WorkerDiedError
from lib.parallel.clock import CLOCK

EXACT_LIMIT = 1 << 53
"""Whole numbers below this are exact in float64."""


def all_reduce_sum(values: Mapping[str, float | int]) -> dict[str, float | int]:
    """Sum each value over the ranks, in one collective; the keys must be the same on all ranks.

    Integers come back as exact integers (asserted to stay below 2^53), floats as float64 sums.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return dict(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=device)
    with CLOCK.part("collective"):
        dist.all_reduce(sums)
    totals: dict[str, float | int] = {}
    for (name, value), total in zip(values.items(), sums.tolist()):
        if isinstance(value, int):
            assert max(abs(value), abs(total)) < EXACT_LIMIT, f"sum of {name} is too large to be exact: {total}"
        totals[name] = int(total) if isinstance(value, int) else total
    return totals


def gather_rows(values: Sequence[float]) -> list[list[float]]:
    """[num_ranks] every rank's numbers, on every rank; as many on each. One collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return [list(values)]
    own = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    with CLOCK.part("collective"):
        dist.all_gather(rows, own)
    return [row.tolist() for row in rows]


def barrier(deadline_seconds: float) -> None:
    """Wait for all ranks.

    Raises:
        WorkerDiedError: a rank didn't arrive in time; rank 0 names it (gloo).
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    timeout = timedelta(seconds=deadline_seconds)
    try:
        if dist.get_backend() == "gloo":
            dist.monitored_barrier(timeout=timeout, wait_all_ranks=True)
        else:
            dist.all_reduce(torch.zeros(1, device="cuda"), async_op=True).wait(timeout)
    except RuntimeError as error:
        raise WorkerDiedError(
            f"rank {dist.get_rank()}: not all ranks arrived within {deadline_seconds:g} s: {error}"
        ) from error


def clip_grad_norm(parameters: Iterable[torch.Tensor], max_norm: float) -> float:
    """Scale all gradients so that their common 2-norm is at most `max_norm`; returns the norm before.

    Works on whole and on sharded gradients; the result is the same on all ranks and doesn't depend on their number but
    for rounding. A norm that is not finite is returned and the gradients are left alone.
    """
    layouts: dict[tuple[dist.ProcessGroup, ...], list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            piece = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            layouts.setdefault(_shard_groups(parameter.grad), []).append(piece)
    squares = 0.0
    for groups, pieces in layouts.items():
        total = torch.stack(torch._foreach_norm(pieces)).double().square().sum()
        for group in groups:
            with CLOCK.part("collective"):
                dist.all_reduce(total, group=group)
        squares += float(total)
    norm = math.sqrt(squares)
    scale = max_norm / (norm + 1e-6)
    if math.isfinite(norm) and scale < 1.0:
        for pieces in layouts.values():
            torch._foreach_mul_(pieces, scale)
    return norm


def _shard_groups(gradient: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups whose ranks hold different pieces of it."""
    if not isinstance(gradient, DTensor):
        return ()
    axes = [axis for axis, placement in enumerate(gradient.placements) if not placement.is_replicate()]
    return tuple(gradient.device_mesh.get_group(axis) for axis in axes)

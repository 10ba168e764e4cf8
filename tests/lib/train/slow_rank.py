"""What the ranks of the test of times do. Kept apart, so that a rank starts without pytest."""

import time
from typing import Any

import torch
import torch.distributed as dist

from lib.parallel.clock import CLOCK
from lib.parallel.reduce import all_reduce_sum
from lib.train.times import StepTimes


def steps(num_steps: int) -> list[dict[str, Any]]:
    """Rows of steps in which rank 1 is slow."""
    dist.barrier()
    CLOCK.start(torch.device("cpu"))
    rows = []
    for _ in range(num_steps):
        with CLOCK.part("wait"):
            all_reduce_sum({"count": 1})
        with CLOCK.part("forward"):
            time.sleep(0.02 + 0.05 * dist.get_rank())
        with CLOCK.part("wait"):
            all_reduce_sum({"count": 1})
        rows.append(StepTimes.over_ranks(torch.device("cpu")).row())
    return rows

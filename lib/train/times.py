"""How long each rank took over a step, with what, and how much memory it has needed: the table behind timings.jsonl."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.core.manifest import Json
from lib.parallel.clock import CLOCK, PARTS
from lib.parallel.reduce import gather_rows


@dataclass(frozen=True)
class RankTime:
    """One rank's step."""

    seconds: float
    parts: dict[str, float]
    """Seconds of each of PARTS."""
    peak_memory_bytes: int
    """Most that its process has held at once since it began; on a GPU, that its allocator has."""

    @property
    def busy_seconds(self) -> float:
        """Without waiting for other ranks, as far as the host can tell: on GPUs, shards travel within forward and backward."""
        return self.seconds - self.parts["wait"] - self.parts["collective"]


@dataclass(frozen=True)
class StepTimes:
    """A step on all ranks."""

    ranks: tuple[RankTime, ...]

    @staticmethod
    def over_ranks(device: torch.device) -> "StepTimes":
        """What the clock has counted since the last time. All ranks must call it; one collective, of host memory."""
        parts, seconds = CLOCK.take()
        with CLOCK.part("wait"):
            rows = gather_rows([seconds, *(parts[name] for name in PARTS), float(peak_memory(device))])
        return StepTimes(tuple(RankTime(row[0], dict(zip(PARTS, row[1:-1])), int(row[-1])) for row in rows))

    def row(self) -> Json:
        """{"parts": means over the ranks and what no part covers, as "other"; "busy_seconds", "peak_memory_bytes": by rank;
        "slowest_rank"; "slowest_over_mean": its busy time over the ranks' mean}."""
        busy = [rank.busy_seconds for rank in self.ranks]
        slowest = max(range(len(busy)), key=busy.__getitem__)
        parts = {name: _mean(rank.parts[name] for rank in self.ranks) for name in PARTS}
        other = _mean(rank.seconds for rank in self.ranks) - sum(parts.values())
        return {
            "parts": {**parts, "other": other},
            "busy_seconds": [round(seconds, 6) for seconds in busy],
            "slowest_rank": slowest,
            "slowest_over_mean": busy[slowest] / max(_mean(busy), 1e-9),
            "peak_memory_bytes": [rank.peak_memory_bytes for rank in self.ranks],
        }


def times_summary(timings: Sequence[Json]) -> Json:
    """Of a run, from the rows of timings.jsonl: seconds of each part, peak memory by rank, and the rank that was the slowest
    most often, with its share of the steps and the median of how far it was behind."""
    if not timings:
        return {"part_seconds": {}, "peak_memory_bytes": [], "slowest": None}
    parts = {name: sum(row["parts"][name] for row in timings) for name in timings[0]["parts"]}
    rank, count = Counter(row["slowest_rank"] for row in timings).most_common(1)[0]
    behind = sorted(row["slowest_over_mean"] for row in timings if row["slowest_rank"] == rank)
    slowest = {"rank": rank, "share_of_steps": count / len(timings), "over_mean": behind[len(behind) // 2]}
    return {"part_seconds": parts, "peak_memory_bytes": timings[-1]["peak_memory_bytes"], "slowest": slowest}


def peak_memory(device: torch.device) -> int:
    """Bytes: of the process, as the kernel keeps them, or of the allocator of a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)

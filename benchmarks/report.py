"""What all benchmarks share: the CPU profile, fair timing, and the JSON object each prints as its last line."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.core.versions import library_versions

_PROFILE = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ARROW_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(16 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(1 << 30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""One thread and no spinning, for us and for every peer; read once at start, so the process is started again with it."""
_APPLIED = "POSTFLYTE_BENCH_PROFILE"


def apply_cpu_profile() -> None:
    """Start this process again with the one-thread CPU profile unless it has it already."""
    if os.environ.get(_APPLIED) != "1":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | _PROFILE | {_APPLIED: "1"})


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def interleaved_cpu_seconds(variants: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """CPU seconds (user + system, of this process) of each variant in each round.

    The order is turned round every round (A B C, C B A, ...), so that drift of a busy machine falls on all alike.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            start = time.process_time()
            variants[name]()
            seconds[name].append(time.process_time() - start)
            say(f"  round {index + 1}/{rounds} {name}: {seconds[name][-1]:.3f} CPU s")
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine(floor: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Processor, threads, load and library versions, beside the ceilings measured in this run."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or None,
        "load": list(os.getloadavg()),
        "versions": {"python": platform.python_version(), **library_versions()},
        "floor": dict(floor or {}),
    }


@dataclass
class Report:
    """The JSON object of a benchmark. A ratio above 1 always means that ours is better."""

    benchmark: str
    ours: dict[str, float] = field(default_factory=dict)
    peers: dict[str, dict[str, float]] = field(default_factory=dict)
    """Peer -> figure -> value."""
    ratios: dict[str, float] = field(default_factory=dict)
    """`<figure>_vs_<peer>`; times and bytes are peer / ours, rates are ours / peer."""
    targets: dict[str, float] = field(default_factory=dict)
    """Lowest acceptable value of a ratio or of one of our own figures, by the same name."""
    details: dict[str, Any] = field(default_factory=dict)
    """Single cases behind the figures."""

    def compare(self, figure: str, peer: str, *, smaller_is_better: bool, target: float | None = None) -> None:
        """Set the ratio of `figure` against `peer`, and its target."""
        ours, theirs = self.ours[figure], self.peers[peer][figure]
        name = f"{figure}_vs_{peer}"
        self.ratios[name] = theirs / ours if smaller_is_better else ours / theirs
        if target is not None:
            self.targets[name] = target

    def print(self, floor: Mapping[str, float] | None = None) -> None:
        """Write the object as one line on stdout."""
        measured = self.ours | self.ratios
        body = {
            "benchmark": self.benchmark,
            "ours": self.ours,
            "peers": self.peers,
            "ratios": self.ratios,
            "targets": self.targets,
            "met": {name: measured[name] >= target for name, target in self.targets.items()},
            "machine": machine(floor),
            "details": self.details,
        }
        print(json.dumps(body, allow_nan=False), flush=True)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

"""What is written down of every step, and how fast the machine was.

`metrics.jsonl` holds only what the run computes (equal for a run that was killed and resumed, to the last digit);
`timings.jsonl` holds what the clock says.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from lib.core.errors import ArtifactCorruptError, InfraError
from lib.core.manifest import Json, canonical_json
from lib.parallel.devices import known_device
from lib.train.compact_ids import compact_ids
from lib.train.times import StepTimes, times_summary

METRICS_NAME = "metrics.jsonl"
TIMINGS_NAME = "timings.jsonl"
LOG_NAMES = (METRICS_NAME, TIMINGS_NAME)
"""They are part of each checkpoint, up to its step."""


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, over all ranks. Every field is a function of the job and its inputs alone."""

    step: int
    """1 to steps."""
    loss: float
    """What was minimised, of the whole step."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    num_targets: int
    num_tokens: int
    """Tokens that aren't padding."""
    num_slots: int
    """Tokens and padding."""
    sample_ids: tuple[str, ...]
    """Of the step's samples."""
    figures: Mapping[str, float]
    """Name -> what else the recipe says of a step."""


class StepLog:
    """A JSON-lines file with one line a step. A resumed run cuts what a killed one had written past its checkpoint.

    A checkpoint holds a copy that has been flushed to the disk, so no line is lost that a later run needs.
    """

    def __init__(self, path: Path, *, resume_step: int, steps_before: int = 0) -> None:
        """Keep the lines of steps steps_before + 1 to resume_step and go on after them.

        Raises:
            ArtifactCorruptError: lines of those steps are missing or out of order.
        """
        kept = [row for row in read_rows(path) if row["step"] <= resume_step]
        if [row["step"] for row in kept] != list(range(steps_before + 1, resume_step + 1)):
            raise ArtifactCorruptError(
                f"{path}: doesn't hold steps {steps_before + 1} to {resume_step}; remove the run's checkpoints and start again"
            )
        self._path = path
        fresh = path.with_name(f".{path.name}.new")
        with fresh.open("w", encoding="utf-8") as stream:
            stream.writelines(canonical_json(row) + "\n" for row in kept)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, path)
        self._stream: TextIO = path.open("a", encoding="utf-8")

    def write(self, row: Json) -> None:
        """Append a line; a kill after this call doesn't lose it. Raises InfraError when the disk is full or fails."""
        try:
            self._stream.write(canonical_json(row) + "\n")
            self._stream.flush()
        except OSError as error:
            raise InfraError(
                f"{self._path}: can't write step {row['step']}: {error}. Free disk space there and run again: it goes on from "
                "the last published checkpoint, which is untouched"
            ) from error

    def close(self) -> None:
        self._stream.close()


def read_rows(path: Path) -> list[Json]:
    """The lines of a JSON-lines file; none if there is no file. A last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


def report_row(report: StepReport) -> Json:
    """A line of metrics.jsonl; the same on any number of ranks, but for rounding."""
    row: Json = {**asdict(report), "samples": compact_ids(report.sample_ids), **report.figures}
    del row["sample_ids"], row["figures"]
    return row


class SpeedMeter:
    """Tokens per second, share of the machine's peak and time left, from the steps of this start of the run."""

    def __init__(self, *, steps: int, peak_flops: float) -> None:
        """peak_flops: of all ranks together, per second."""
        self._steps, self._peak_flops = steps, peak_flops
        self._recent: list[float] = []

    def step_done(self, *, step: int, num_tokens: int, flops: int, times: StepTimes) -> Json:
        """{"seconds" of rank 0, "tokens_per_second", "mfu", "eta_seconds"} of a step, and the row of its times."""
        seconds = max(times.ranks[0].seconds, 1e-9)
        self._recent = [*self._recent[-19:], seconds]
        typical = sorted(self._recent)[len(self._recent) // 2]
        return {
            "seconds": seconds,
            "tokens_per_second": num_tokens / seconds,
            "mfu": flops / seconds / self._peak_flops,
            "eta_seconds": typical * (self._steps - step),
            **times.row(),
        }


def speed_summary(timings: Sequence[Json]) -> Json:
    """Medians and totals of timings.jsonl rows, for people; see `times_summary` for the rest."""

    def median(values: Iterable[float]) -> float:
        ordered = sorted(values)
        return ordered[len(ordered) // 2] if ordered else 0.0

    return {
        "train_seconds": sum(row["seconds"] for row in timings),
        "median_step_seconds": median(row["seconds"] for row in timings),
        "median_tokens_per_second": median(row["tokens_per_second"] for row in timings),
        "median_mfu": median(row["mfu"] for row in timings),
        **times_summary(timings),
    }


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that one rank could reach: the data sheet's on a known GPU, else measured.

    Call it on all ranks at the same time: they share the processor's power and memory while they train, too.
    """
    if device.type == "cuda":
        known = known_device(torch.cuda.get_device_name(device))
        if known is not None:
            return known.flops
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        product: Any = left @ right
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best

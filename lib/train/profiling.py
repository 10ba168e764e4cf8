"""Traces of some steps of a run, for Perfetto or chrome://tracing: one file for each rank."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lib.config.train import ProfileConfig
from lib.parallel.clock import CLOCK

PROFILES = "profiles"


class StepProfiler:
    """Watches the steps that the configuration names, and only them."""

    def __init__(self, config: ProfileConfig | None, run_dir: Path, rank: int, device: torch.device) -> None:
        self._config, self._folder, self._rank, self._device = config, run_dir / PROFILES, rank, device
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]

    def watch(self, steps: Iterable[int]) -> Iterator[int]:
        """The same numbers; what is done between two of them belongs to the first. Starts the clock. The trace is written
        after the last step that is watched, as profiles/rank-00000-steps-2-to-3.json.gz."""
        began, watching = 0, None
        CLOCK.start(self._device)
        for step in steps:
            if self._config and watching is None and self._config.first_step <= step <= self._config.last_step:
                began, watching = step, profile(activities=self._activities)
                watching.start()
            yield step
            if self._config and watching is not None and step == self._config.last_step:
                watching.stop()
                self._write(watching, began, step)
                watching = None

    def _write(self, watched: profile, began: int, ended: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        watched.export_chrome_trace(str(self._folder / f"rank-{self._rank:05d}-steps-{began}-to-{ended}.json.gz"))

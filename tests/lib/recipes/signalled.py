"""Ranks that are hit by a signal at a known point of a run, however fast or slow the machine is at that time."""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from lib.cluster.group import WorkerGroup, dispatch
from lib.cluster.local import LocalGroup
from lib.core.manifest import Json
from lib.recipes.sft import SftWorker

KILLED_AT = 6
"""Step at whose save a rank is killed."""
TOLD_AT = 3
"""Step after whose trace a rank is told to stop; the run has to be one that traces it."""
TRACED = {"profile": {"first_step": TOLD_AT}}


class KilledWorker(SftWorker):
    """The last rank gets SIGKILL when it begins to write its part of a checkpoint, in the first start of a run."""

    @dispatch()
    def train(self, job_values: Json, place: Json) -> Json:
        if self.info.rank == self.info.num_ranks - 1 and not place["resume_step"]:
            part = f"{place['run_dir']}/checkpoints/.staging-step-{KILLED_AT:08d}"
            _once_opened(part, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return super().train(job_values, place)


class ToldWorker(SftWorker):
    """The process of the last rank gets SIGTERM amid a run, and the rank does nothing more before it knows."""

    @dispatch()
    def train(self, job_values: Json, place: Json) -> Json:
        if self.info.rank == self.info.num_ranks - 1 and not place["resume_step"]:
            _once_opened(f"{place['run_dir']}/profiles/rank-{self.info.rank:05d}", self._tell)
        return super().train(job_values, place)

    def _tell(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 60.0
        while not self.stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)


def group_of(worker_class: type[SftWorker], **options: Any) -> Callable[..., WorkerGroup]:
    """Starts that worker whatever a recipe asks for."""
    return lambda _, shape, **arguments: LocalGroup(worker_class, shape, **arguments, **options)


def _once_opened(beginning: str, act: Callable[[], None]) -> None:
    """Act when a file whose path begins so is opened for the first time; audit hooks stay as long as the process."""
    waiting = [act]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and waiting and str(args[0]).startswith(beginning):
            waiting.pop()()

    sys.addaudithook(hook)

"""Where a rank's time goes, in parts that don't overlap: what one part does inside another is taken out of the outer one.

There is one clock in a process, because collectives are called from within autograd, where no argument reaches them. Parts
that compute on a GPU are timed there, by events on its stream that are read once they have passed: the host never waits for
them, and a part counts in the step in which it ended. So the optimizer's last work is found in the step after.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Part = Literal["data", "wait", "forward", "backward", "optimizer", "collective", "save"]
PARTS: tuple[Part, ...] = ("data", "wait", "forward", "backward", "optimizer", "collective", "save")
"""data: for its own batch; wait: for other ranks, the batch at hand; collective: transfers that the host makes or waits for,
among them those of shards through shared memory; save: copying the state and publishing."""
_ON_DEVICE = {"forward", "backward", "optimizer"}


class StepClock:
    """Seconds of each part since the last `take`."""

    def __init__(self) -> None:
        self.start(torch.device("cpu"))

    def start(self, device: torch.device) -> None:
        """From here on, for a rank that computes on `device`."""
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._within: list[Part] = []
        self._marks: list[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = []
        self._turned = self._taken = time.perf_counter()

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count the block's time as that of a part. What is waited for stays `wait`, whatever it is made of."""
        if self._within[-1:] == ["wait"]:
            yield
            return
        self._turn()
        self._within.append(name)
        began = self._mark(name)
        try:
            yield
        finally:
            ended = self._mark(name)
            if began is not None and ended is not None:
                self._marks.append((name, began, ended))
            self._turn()
            self._within.pop()

    def take(self) -> tuple[dict[Part, float], float]:
        """(seconds of each part, seconds in all) since the last time, or since the start."""
        while self._marks and self._marks[0][2].query():  # type: ignore[no-untyped-call]
            name, began, ended = self._marks.pop(0)
            self._seconds[name] += began.elapsed_time(ended) / 1e3
        now = time.perf_counter()
        found, total = self._seconds, now - self._taken
        self._seconds, self._taken = dict.fromkeys(PARTS, 0.0), now
        return found, total

    def _turn(self) -> None:
        """Give the time since the last turn to the part that the host is in."""
        now = time.perf_counter()
        if self._within and not self._timed_there(self._within[-1]):
            self._seconds[self._within[-1]] += now - self._turned
        self._turned = now

    def _mark(self, name: Part) -> torch.cuda.Event | None:
        if not self._timed_there(name):
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _timed_there(self, name: Part) -> bool:
        return self._on_gpu and name in _ON_DEVICE


CLOCK = StepClock()

"""Which checkpoints of a run are kept."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """A checkpoint is kept while any of the rules holds for it."""

    newest: int
    """As many of the newest; at least 1."""
    every: int | None = None
    """Those of steps that are multiples of this, for ever."""
    best: int = 0
    """As many of those whose step had the lowest loss; of equal ones, the earlier."""

    def kept(self, losses: Mapping[int, float]) -> set[int]:
        """Of the published steps (step -> its loss), those that stay."""
        steps = sorted(losses, reverse=True)
        best = sorted(losses, key=lambda step: (losses[step], step))[: self.best]
        return {*steps[: self.newest], *best, *(step for step in steps if self.every and step % self.every == 0)}


def is_saved(step: int, *, steps: int, every: int) -> bool:
    """A run of `steps` steps has a checkpoint of this one: each multiple of `every`, and the last."""
    return step % every == 0 or step == steps

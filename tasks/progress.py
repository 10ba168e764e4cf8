"""Progress bars on a terminal; in a log, a line now and then."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

TERMINAL_SECONDS, LOG_SECONDS = 0.1, 20.0
"""Least time between two updates where a person watches, and where nobody does."""


class Bar:
    """A counter that shows itself."""

    def __init__(self, shown: "tqdm[Any]") -> None:
        self._shown = shown

    def add(self, count: int) -> None:
        """So many more are done."""
        self._shown.update(count)

    def reach(self, count: int) -> None:
        """So many are done in all."""
        self._shown.update(count - self._shown.n)

    def tell(self, count: int, /, **figures: float | str) -> None:
        """So many are done in all; figures to show beside it."""
        shown = {name: value if isinstance(value, str) else f"{value:.4g}" for name, value in figures.items()}
        self._shown.set_postfix(shown, refresh=False)
        self.reach(count)


@contextmanager
def bar(title: str, unit: str, total: int | None = None) -> Iterator[Bar]:
    """A bar that ends with the block."""
    pause = TERMINAL_SECONDS if sys.stderr.isatty() else LOG_SECONDS
    with tqdm(desc=title, unit=f" {unit}", total=total, mininterval=pause, maxinterval=LOG_SECONDS, file=sys.stderr) as shown:
        yield Bar(shown)

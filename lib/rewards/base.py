"""What a reward is: a function from a model's text and the expected answer to a score that can be explained.

The text is hostile: written by something that is paid for the score. Whatever it holds, a reward returns; a wrong format
is worth 0.0 and shows in `parts`. The expected answer is data; see `lib.rewards.catalogue.expected_problem`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """The value, and what it came from."""

    value: float
    """0.0 to 1.0."""
    parts: dict[str, float] = field(default_factory=dict)
    """Why: name -> contribution or flag, for counters and decks."""


Reward = Callable[[str, str], Score]
"""(text of the answer, expected answer) -> score. Never raises for any text."""

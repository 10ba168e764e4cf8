"""Rewards by the names that a configuration uses."""

from lib.rewards.base import Reward
from lib.rewards.exact import exact_match, last_number, parse_number

REWARDS: dict[str, Reward] = {"exact": exact_match, "last_number": last_number}


def expected_problem(name: str, expected: str) -> str | None:
    """Why a reward can't use an expected answer, or None; asked once for each row, before anything is generated."""
    if not expected.strip():
        return "the answer is empty"
    if name == "last_number" and parse_number(expected) is None:
        return f"the answer {expected[:80]!r} is not a number; correct it or choose the verifier 'exact'"
    return None

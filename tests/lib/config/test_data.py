"""Contradictions in the data's configuration are refused, with what to change."""

from typing import Any

import pytest

from lib.config.data import DataConfig
from lib.core.errors import ConfigError


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ([{"name": "a"}, {"name": "a", "location": "x"}], "two sources of the name 'a'"),
        ([{"name": "a"}, {"name": "b"}], "own data .* twice"),
        ([{"name": "a", "max_epochs": 1}, {"name": "b", "location": "x", "max_rows": 5}], "every source .* leave one without"),
        ([{"name": "a", "weight": 2.0, "schedule": [{"step": 0, "weight": 1.0}]}], "both weight and schedule"),
        ([{"name": "a", "schedule": [{"step": 5, "weight": 1.0}, {"step": 5, "weight": 2.0}]}], "must rise"),
        ([{"name": "a", "schedule": [{"step": 0, "weight": 0.0}]}], "weight 0 at every step"),
        (
            [
                {"name": "a", "schedule": [{"step": 0, "weight": 1.0}, {"step": 9, "weight": 0.0}]},
                {"name": "b", "location": "x", "schedule": [{"step": 9, "weight": 0.0}, {"step": 12, "weight": 1.0}]},
            ],
            "at step 9 every source",
        ),
        ([{"name": "a", "weight": 0.0}], "greater than 0"),
        ([{"name": "a b"}], "pattern"),
        ([{"name": "a", "weihgt": 1.0}], "no such key"),
    ],
)  # fmt: skip
def test_contradictions_of_a_mixture_are_refused(mixture: list[dict[str, Any]], message: str) -> None:
    """[A18]"""
    with pytest.raises(ConfigError, match=message):
        DataConfig.parse({"mixture": mixture}, where="test")


def test_temperature_needs_a_mixture() -> None:
    with pytest.raises(ConfigError, match="no two sources to mix"):
        DataConfig.parse({"temperature": 2.0}, where="test")

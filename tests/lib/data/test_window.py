"""A scheduled run reads the whole of the day before, in UTC."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from lib.core.errors import ConfigError
from lib.data.window import day_before

PATTERN = "s3://rows/%Y-%m-%d/"


def test_the_day_before_in_utc() -> None:
    """01:30 in Tokyo on 1 March 2024 is 16:30 on 29 February in UTC; the day before that is the 28th."""
    assert day_before(PATTERN, datetime(2024, 3, 1, 2, tzinfo=UTC)) == "s3://rows/2024-02-29/"
    assert day_before(PATTERN, datetime(2024, 3, 1, 1, 30, tzinfo=timezone(timedelta(hours=9)))) == "s3://rows/2024-02-28/"


def test_a_pattern_without_a_day_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds no day"):
        day_before("s3://rows/latest/", datetime(2024, 3, 1, tzinfo=UTC))

"""Which rows belong to a scheduled run."""

from datetime import UTC, datetime, timedelta

from lib.core.errors import ConfigError


def day_before(pattern: str, kickoff_time: datetime) -> str:
    """The address of the rows of the UTC day before `kickoff_time`.

    Raises:
        ConfigError: the pattern doesn't tell one day from another, so every run would read the same rows.
    """
    day = kickoff_time.astimezone(UTC) - timedelta(days=1)
    address = day.strftime(pattern)
    if address == (day + timedelta(days=1)).strftime(pattern):
        raise ConfigError(f"data pattern {pattern!r} holds no day; write the date as %Y-%m-%d")
    return address

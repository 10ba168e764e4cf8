"""A Flyte cache of a test's own, and what was run and what was taken from it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flytekit.core.local_cache import LocalTaskCache


@contextmanager
def own_cache(folder: Path) -> Iterator[Path]:
    """Cache and home in a folder; gives the ledger that tasks write a line to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTFLYTE_HOME", str(folder / "home"))
        patch.setenv("POSTFLYTE_LEDGER", str(folder / "ledger.jsonl"))
        patch.setenv("FLYTE_LOCAL_CACHE_ENABLED", "true")
        patch.setattr("flytekit.core.local_cache.CACHE_LOCATION", str(folder / "cache"))
        patch.setattr(LocalTaskCache, "_initialized", False)
        yield folder / "ledger.jsonl"
    LocalTaskCache._initialized = False


def take_events(ledger: Path) -> list[tuple[str, str]]:
    """(event, task) of each line, then forgets them."""
    lines = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    ledger.unlink()
    return [(line["event"], line["task"].split(".")[-1]) for line in lines]

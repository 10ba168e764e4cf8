"""What the tests of workflows share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flyte_cache import own_cache


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a module's own cache and home."""
    with own_cache(tmp_path_factory.mktemp("state")) as ledger:
        yield ledger

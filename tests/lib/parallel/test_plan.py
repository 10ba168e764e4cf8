"""What a model can't be cut into is refused before anything starts."""

import pytest

from lib.config.parallel import ParallelConfig
from lib.core.errors import ConfigError
from lib.parallel.plan import check_plan


@pytest.mark.parametrize("axis", ["tensor", "expert", "context"])
def test_what_does_not_work_is_refused(axis: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.parallel\.{axis} is 2, which is not supported; leave it out"):
        check_plan(ParallelConfig(**{axis: 2}))

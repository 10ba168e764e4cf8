"""Which models can be cut in which ways: asked at the door, before any rank starts."""

from lib.config.parallel import ParallelConfig
from lib.core.errors import ConfigError

_UNSUPPORTED = ("tensor", "expert", "context")


def check_plan(parallel: ParallelConfig) -> None:
    """Refuse sizes that the model can't be cut into.

    Raises:
        ConfigError: names the size, the number of the model that doesn't fit, and the remedy.
    """
    for name in _UNSUPPORTED:
        if (size := getattr(parallel, name)) != 1:
            raise ConfigError(f"config.parallel.{name} is {size}, which is not supported; leave it out, so that it is 1")

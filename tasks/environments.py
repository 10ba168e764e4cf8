"""Where tasks run: images, resources, deadlines, and which failures are retried."""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import ParamSpec, TypeVar

from flytekit import Resources
from flytekit.exceptions.user import FlyteRecoverableException

from lib.core.transient import is_transient
from tasks.config_type import register

register()  # before any task's interface is read

CPU_IMAGE = "{{.images.cpu.fqn}}:{{.images.cpu.version}}"
TRAIN_IMAGE = "{{.images.train.fqn}}:{{.images.train.version}}"
"""Names of `[images]` in flyte.config."""

SMALL = Resources(cpu="1", mem="2Gi", ephemeral_storage="10Gi")
MEDIUM = Resources(cpu="4", mem="16Gi", ephemeral_storage="100Gi")
RETRIES = 2
SHORT, LONG = timedelta(hours=2), timedelta(days=7)

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")


def retry_infrastructure(function: Callable[_Params, _Result]) -> Callable[_Params, _Result]:
    """Let Flyte retry what may pass by itself, and nothing else: a user's mistake fails at once."""

    @functools.wraps(function)
    def guarded(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if is_transient(error):
                raise FlyteRecoverableException(f"{type(error).__name__}: {error}") from error
            raise

    return guarded

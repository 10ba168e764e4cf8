"""Which failures may pass by themselves, so that another try is worth it.

An error of this project says so by its class. Others are told by what they are: the machine, its disk and its network come
back; a missing file, a bug or want of memory for the same input don't. What isn't listed isn't tried again.
"""

import errno
import socket
from typing import Any

from lib.core import errors
from lib.core.errors import InfraError, PostflyteError

TRANSIENT_ERRNOS = frozenset(
    {
        *(errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EREMOTEIO),  # a disk
        *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EMFILE, errno.ENFILE),  # a machine with too much to do
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),  # a network
        *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EADDRINUSE),
    }
)
"""Of an OSError that Python has no transient class for."""
TRANSIENT_CLASSES = {
    "aiohttp": {"ClientConnectionError", "ClientPayloadError"},
    "botocore": {"ConnectionError", "HTTPClientError"},
    "httpx": {"TransportError"},
    "httpx2": {"TransportError"},
    "ray": {"RayError"},
    "requests": {"ConnectionError", "Timeout", "ChunkedEncodingError"},
    "torch": {"DistError"},
}
"""Package -> classes whose descendants are transient; by name, so that judging loads none of these packages."""
LASTING_CLASSES = {"ray": {"RayTaskError", "RuntimeEnvSetupError"}}
"""Exceptions from these: the first match in the order of a class's ancestors counts."""
TRANSIENT_STATUS = frozenset({408, 425, 429, *range(500, 600)})
"""HTTP: the server had no time, or failed."""


def is_transient(error: BaseException) -> bool:
    """Whether the same may succeed the next time."""
    if isinstance(error, PostflyteError):
        return isinstance(error, InfraError)
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)) or _http_status(error) in TRANSIENT_STATUS:
        return True
    for kind in type(error).__mro__:
        package = kind.__module__.partition(".")[0]
        if kind.__name__ in LASTING_CLASSES.get(package, ()):
            return False
        if kind.__name__ in TRANSIENT_CLASSES.get(package, ()):
            return True
    return isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS


def class_elsewhere(error: BaseException) -> str | None:
    """Name of the class of lib.core.errors that another process raises for `error`; None for a bug."""
    if isinstance(error, PostflyteError):
        return next(name for kind in type(error).__mro__ if getattr(errors, name := kind.__name__, None) is kind)
    return InfraError.__name__ if is_transient(error) else None


def _http_status(error: BaseException) -> int | None:
    """As requests and httpx, botocore, or aiohttp keep it."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None) or getattr(error, "status", None)
    return found if isinstance(found, int) else None

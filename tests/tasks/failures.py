"""Failures as they happen, each with whether Flyte shall try again; raised where tests ask for them."""

import errno
from collections.abc import Callable

import httpx
import requests
import torch
from botocore.exceptions import ClientError, EndpointConnectionError
from ray.exceptions import NodeDiedError
from torch.distributed import DistNetworkError

from lib.core import errors
from lib.core.errors import DataError


class RowError(DataError):
    """A class that lib.core.errors doesn't know."""


def _os(number: int) -> OSError:
    return OSError(number, errno.errorcode[number], "/postflyte/file")


def _of_hub(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "https://huggingface.co/api")
    return httpx.HTTPStatusError(f"status {status}", request=request, response=httpx.Response(status, request=request))


def _of_store(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


FAILURES: dict[str, tuple[Callable[[], BaseException], bool]] = {
    # Ours: the class says it.
    "wrong setting": (lambda: errors.ConfigError("steps: 0"), False),
    "bad row": (lambda: RowError("rows.jsonl:7: no role"), False),
    "loss not finite": (lambda: errors.NonFiniteLossError("step 3"), False),
    "run in use": (lambda: errors.RunInUseError("pid 7"), False),
    "preemption": (lambda: errors.PreemptedError("saved step 3"), True),
    "death of a worker": (lambda: errors.WorkerDiedError("rank 1: out of memory"), True),
    "engine gone": (lambda: errors.GenerationError("no answer"), True),
    "damaged artifact": (lambda: errors.ArtifactCorruptError("sha256 differs"), True),
    # The disk.
    "disk full": (lambda: _os(errno.ENOSPC), True),
    "disk failed": (lambda: _os(errno.EIO), True),
    "shared file system away": (lambda: _os(errno.ESTALE), True),
    "no such file": (lambda: _os(errno.ENOENT), False),
    "no right to write": (lambda: _os(errno.EACCES), False),
    # The network.
    "connection reset": (lambda: _os(errno.ECONNRESET), True),
    "timed out": (lambda: TimeoutError("60 s"), True),
    "no route to the store": (lambda: EndpointConnectionError(endpoint_url="https://s3"), True),
    "no route to the tracker": (lambda: requests.ConnectionError("refused"), True),
    "no route to the Hub": (lambda: httpx.ConnectTimeout("30 s"), True),
    "the Hub is overloaded": (lambda: _of_hub(503), True),
    "the store is overloaded": (lambda: _of_store("SlowDown", 503), True),
    "no right to read the model": (lambda: _of_hub(403), False),
    "no right to read the bucket": (lambda: _of_store("AccessDenied", 403), False),
    # The cluster.
    "lost peers": (lambda: DistNetworkError("the server socket is gone"), True),
    "Ray lost a node": (lambda: NodeDiedError("node 3"), True),
    # The same input would do it again.
    "GPU memory": (lambda: torch.OutOfMemoryError("tried to allocate 20 GiB"), False),
    "memory": (MemoryError, False),
    "bug": (lambda: KeyError("loss"), False),
    "failed assertion": (AssertionError, False),
}


def fail(kind: str) -> None:
    """Raise one of them."""
    raise FAILURES[kind][0]()

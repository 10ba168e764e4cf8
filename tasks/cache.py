"""Cache keys that see code and content, and a local cache that never trusts a hit it hasn't checked.

A task's cache version is the hash of the project code that its function reaches, the versions of the libraries that
decide numbers, and an epoch. flytekit's local cache keeps literals only; here a hit counts if every artifact behind
it is present and unaltered. Each local execution and each hit is written to the ledger, a JSON-lines file named by
`$POSTFLYTE_LEDGER`.
"""

import inspect
import json
import os
import time
from pathlib import Path
from typing import Any

from flytekit import Cache
from flytekit.core.cache import VersionParameters
from flytekit.core.local_cache import LocalTaskCache
from flytekit.loggers import logger
from flytekit.models.literals import LiteralMap

from lib.core.codehash import function_code_hash
from lib.core.errors import PostflyteError
from lib.core.manifest import digest_of
from lib.core.versions import CACHE_EPOCH, library_versions
from tasks.artifacts import ARTIFACT_FORMATS

PLACEMENT_MODULES = (
    "tasks.cache",
    "tasks.cli",
    "tasks.clusters",
    "tasks.environments",
    "tasks.lazy",
    "tasks.on_ray",
    "tasks.progress",
)
"""They say where and when a task runs and what it shows, not what it computes."""


def code_version(module: str, function: str, file: str) -> str:
    """What stands for code, libraries and formats in a cache key."""
    root = Path(file).resolve().parents[module.count(".")]
    code = function_code_hash(root, module, function, ignored=PLACEMENT_MODULES)
    return digest_of({"code": code, "libraries": library_versions(), "epoch": CACHE_EPOCH})


class CodePolicy:
    """flytekit's cache policy protocol."""

    def get_version(self, salt: str, params: VersionParameters[..., Any]) -> str:
        function = inspect.unwrap(params.func)
        return code_version(function.__module__, function.__name__, inspect.getfile(function)) + salt


CACHED = Cache(policies=CodePolicy())

_flytekit_get, _flytekit_set = LocalTaskCache.get, LocalTaskCache.set
_started: dict[str, list[float]] = {}
"""Task name -> start times of executions under way in this process, the newest last."""


def _get_checked(
    task_name: str, cache_version: str, input_literal_map: LiteralMap, cache_ignore_input_vars: tuple[str, ...]
) -> LiteralMap | None:
    """A cached result whose artifacts are all present and unaltered, or None."""
    start = time.perf_counter()
    found = _flytekit_get(task_name, cache_version, input_literal_map, cache_ignore_input_vars)
    problem = _damage(found) if found is not None else None
    if found is not None and problem is None:
        _write_ledger("cached", task_name, found, time.perf_counter() - start)
        return found
    if problem:
        logger.warning(f"{task_name}: the cached result can't be used and is made again: {problem}")
    _started.setdefault(task_name, []).append(time.perf_counter())
    return None


def _set_recorded(
    task_name: str,
    cache_version: str,
    input_literal_map: LiteralMap,
    cache_ignore_input_vars: tuple[str, ...],
    value: LiteralMap,
) -> None:
    _flytekit_set(task_name, cache_version, input_literal_map, cache_ignore_input_vars, value)
    starts = _started.get(task_name)
    _write_ledger("executed", task_name, value, time.perf_counter() - starts.pop() if starts else None)


def _damage(outputs: LiteralMap) -> str | None:
    """The first thing wrong with an artifact among the outputs."""
    for literal in outputs.literals.values():
        blob = literal.scalar.blob if literal.scalar else None
        if blob is None or blob.metadata.type.format not in ARTIFACT_FORMATS:
            continue
        artifact = ARTIFACT_FORMATS[blob.metadata.type.format](blob.uri)
        try:
            artifact.open()
            if literal.hash != artifact.digest:
                return f"{blob.uri}: another content than when it was cached"
        except PostflyteError as error:
            return str(error)
    return None


def _write_ledger(event: str, task_name: str, outputs: LiteralMap, seconds: float | None) -> None:
    ledger = os.environ.get("POSTFLYTE_LEDGER")
    if not ledger:
        return
    blobs = {name: literal.scalar.blob for name, literal in outputs.literals.items() if literal.scalar}
    uris = {name: blob.uri for name, blob in blobs.items() if blob}
    rounded = None if seconds is None else round(seconds, 3)
    line = json.dumps({"event": event, "task": task_name, "outputs": uris, "seconds": rounded})
    with open(ledger, "a", encoding="utf-8") as stream:
        stream.write(line + "\n")


# flytekit offers no hook here; its tasks call these two functions on the class.
LocalTaskCache.get = staticmethod(_get_checked)
LocalTaskCache.set = staticmethod(_set_recorded)

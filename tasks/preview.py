"""Which tasks of a workflow a local run would execute and which it would take from its cache, found by running it without them.

flytekit has no dry run. Here a workflow runs as always, but a task that makes an artifact and isn't cached is noted instead of
executed, and what it would have made goes on as a name for it. A task that is given such a name can't be looked up: it runs,
unless what comes before it makes again what it made before. Tasks whose outputs are plain values (they look at an address, or
check settings) are executed: that is what a run begins with. No result is put into the cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from flytekit import FlyteContext
from flytekit.core.base_task import PythonTask
from flytekit.core.local_cache import LocalTaskCache
from flytekit.models import literals
from flytekit.models.core.types import BlobType

from lib.core.errors import UserError

State = Literal["cached", "runs", "depends", "looks"]
SAYS: dict[State, str] = {
    "cached": "from the cache",
    "runs": "runs",
    "depends": "runs, unless what comes before it makes again what it made before",
    "looks": "looked up now",
}
_UNMADE = "unmade:"


@dataclass
class Preview:
    """What a run would do, in its order."""

    tasks: list[tuple[str, State]] = field(default_factory=list)


def preview(workflow: Any, inputs: dict[str, Any]) -> Preview:
    """Of a local run of a workflow on this machine, with these inputs.

    Raises:
        UserError: an input isn't there, or isn't what it should be.
    """
    found = Preview()
    with _dry(found):
        try:
            workflow(**inputs)
        except UserError:
            raise
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from error
    return found


@contextmanager
def _dry(found: Preview) -> Iterator[None]:
    get, keep, execute = LocalTaskCache.get, LocalTaskCache.set, PythonTask.sandbox_execute

    def look_up(task_name: str, version: str, inputs: literals.LiteralMap, ignored: tuple[str, ...]) -> Any:
        hit = None if _unmade(inputs) else get(task_name, version, inputs, ignored)
        if hit is not None:
            found.tasks.append((task_name, "cached"))
        return hit

    def pretend(task: Any, ctx: FlyteContext, inputs: literals.LiteralMap) -> literals.LiteralMap:
        outputs = task.interface.outputs
        if not _unmade(inputs) and not any(variable.type.blob for variable in outputs.values()):
            found.tasks.append((task.name, "looks"))
            return execute(task, ctx, inputs)
        found.tasks.append((task.name, "depends" if _unmade(inputs) else "runs"))
        return literals.LiteralMap({name: _placeholder(task.name, name) for name in outputs})

    LocalTaskCache.get = staticmethod(look_up)
    LocalTaskCache.set = staticmethod(lambda *_: None)
    PythonTask.sandbox_execute = pretend
    try:
        yield
    finally:
        LocalTaskCache.get, LocalTaskCache.set = staticmethod(get), staticmethod(keep)
        PythonTask.sandbox_execute = execute


def _placeholder(task: str, output: str) -> literals.Literal:
    where = literals.BlobMetadata(BlobType("unmade", BlobType.BlobDimensionality.MULTIPART))
    name = f"{_UNMADE}{task}.{output}"
    return literals.Literal(scalar=literals.Scalar(blob=literals.Blob(where, name)), hash=name)


def _unmade(inputs: literals.LiteralMap) -> bool:
    return any(map(_is_unmade, inputs.literals.values()))


def _is_unmade(literal: literals.Literal) -> bool:
    if literal.collection is not None:
        return any(map(_is_unmade, literal.collection.literals))
    return bool(literal.hash and literal.hash.startswith(_UNMADE))

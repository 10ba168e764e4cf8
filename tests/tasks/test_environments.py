"""What Flyte is told about a failure: to try again if and only if it may pass by itself."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from flyteidl.core import errors_pb2
from flytekit import FlyteContext, task
from flytekit.bin.entrypoint import _dispatch_execute, setup_execution
from flytekit.core.base_task import PythonTask
from flytekit.core.type_engine import TypeEngine
from flytekit.core.utils import write_proto_to_file
from flytekit.models.literals import LiteralMap

from lib.cluster.group import Deadlines, Worker, dispatch
from lib.cluster.local import LocalGroup
from lib.config.parallel import ClusterShape
from lib.core.artifact import stage_artifact
from tasks.artifacts import Dataset, DatasetFolder
from tasks.environments import retry_infrastructure
from tasks.mapping import MapTask
from tests.tasks.failures import FAILURES, fail

ContainerError = errors_pb2.ContainerError


class Failing(Worker):
    """Fails as it is told."""

    @dispatch()
    def fail(self, kind: str) -> None:
        fail(kind)


@task
@retry_infrastructure
def failing(kind: str) -> int:
    fail(kind)
    return 0


@task
@retry_infrastructure
def failing_on_a_rank(kind: str) -> int:
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=1, threads_per_rank=1)
    with LocalGroup(Failing, shape, env={}, deadlines=Deadlines(), process_group=False, in_process=True) as group:
        group.call("fail", kind, deadline_seconds=60.0)
    return 0


@task
@retry_infrastructure
def opening(uri: str) -> int:
    return len(list(DatasetFolder(uri).open().iterdir()))


@task
def handing_over(path: str) -> Dataset:
    """Its body succeeds; what is at `path` is found out when its output is converted."""
    return DatasetFolder(path)


@pytest.fixture
def container(tmp_path: Path) -> Iterator[FlyteContext]:
    """What a task's container runs in."""
    with setup_execution(str(tmp_path / "raw")) as ctx:
        yield ctx


def _error(ctx: FlyteContext, ran: PythonTask, tmp_path: Path, **inputs: Any) -> errors_pb2.ContainerError:
    """What the container of a task leaves for Flyte's backend, which retries RECOVERABLE ones alone."""
    types = {name: list[str] if isinstance(value, list) else type(value) for name, value in inputs.items()}
    literals = {
        name: TypeEngine.to_literal(ctx, value, types[name], TypeEngine.to_literal_type(types[name]))
        for name, value in inputs.items()
    }
    write_proto_to_file(LiteralMap(literals).to_flyte_idl(), str(tmp_path / "inputs.pb"))
    _dispatch_execute(ctx, lambda: ran, str(tmp_path / "inputs.pb"), str(tmp_path / "out"))
    found = errors_pb2.ErrorDocument()
    found.ParseFromString((tmp_path / "out" / "error.pb").read_bytes())
    return found.error


WAYS: dict[str, Callable[[], PythonTask]] = {
    "plain": lambda: failing,
    "map": lambda: MapTask(failing),
    "rank": lambda: failing_on_a_rank,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_retried_when_it_may_pass(container: FlyteContext, tmp_path: Path, way: str, kind: str) -> None:
    """[I10] In a plain task, in an element of a map task, and raised by a rank of a worker group: the same verdict, and the
    message is not lost."""
    make, retried = FAILURES[kind]
    error = _error(container, WAYS[way](), tmp_path, kind=[kind] if way == "map" else kind)
    assert error.kind == (ContainerError.RECOVERABLE if retried else ContainerError.NON_RECOVERABLE)
    assert str(make()) in error.message


@pytest.mark.parametrize(
    ("damage", "retried"),
    [
        pytest.param(lambda folder: (folder / "rows").write_text("other"), True, id="altered"),
        pytest.param(lambda folder: (folder / "manifest.json").unlink(), True, id="half a copy"),
        pytest.param(shutil.rmtree, False, id="not there"),
    ],
)
def test_a_failure_after_the_body_is_judged_alike(
    container: FlyteContext, tmp_path: Path, fresh_home: Path, damage: Callable[[Path], Any], retried: bool
) -> None:
    """[I10, I7] Outputs are checked and kept when they are converted, where Flyte has rules of its own."""
    with stage_artifact(tmp_path / "made", "dataset") as staged:
        (staged.path / "rows").write_text("1")
    damage(tmp_path / "made")
    error = _error(container, handing_over, tmp_path, path=str(tmp_path / "made"))
    assert error.kind == (ContainerError.RECOVERABLE if retried else ContainerError.NON_RECOVERABLE)


def test_an_artifact_of_another_kind_is_a_mistake(container: FlyteContext, tmp_path: Path) -> None:
    with stage_artifact(tmp_path / "made", "model") as staged:
        (staged.path / "weights").write_text("1")
    error = _error(container, opening, tmp_path, uri=str(tmp_path / "made"))
    assert error.kind == ContainerError.NON_RECOVERABLE
    assert "holds a 'model', expected a 'dataset'" in error.message


def test_a_store_that_does_not_answer_is_asked_again(
    container: FlyteContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[I10] Nobody listens at port 1."""
    for name, value in (("ENDPOINT_URL", "http://127.0.0.1:1"), ("MAX_ATTEMPTS", "1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "x")
    s3fs.S3FileSystem.clear_instance_cache()
    assert _error(container, opening, tmp_path, uri="s3://bucket/dataset").kind == ContainerError.RECOVERABLE
    s3fs.S3FileSystem.clear_instance_cache()

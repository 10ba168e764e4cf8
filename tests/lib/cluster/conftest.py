"""Both backends, each started once where a test doesn't break it."""

from collections.abc import Callable
from typing import Any

import pytest

from lib.cluster.group import Deadlines, GroupFactory, Worker, WorkerGroup
from lib.cluster.local import LocalGroup
from lib.cluster.ray_backend import RayGroup
from lib.config.parallel import ClusterShape
from tests.lib.cluster.workers import Probe
from tests.local_ray import ray_here as ray_here

ENV = {"OMP_NUM_THREADS": "1", "POSTFLYTE_TEST_VALUE": "from the driver"}
BACKENDS: dict[str, GroupFactory] = {"local": LocalGroup, "ray": RayGroup}

Start = Callable[..., WorkerGroup]


@pytest.fixture(scope="session", params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "ray":
        request.getfixturevalue("ray_here")
    return name


@pytest.fixture(scope="session")
def start(backend: str) -> Start:
    """Start a group of two ranks on the backend under test."""

    def start_group(worker_class: type[Worker] = Probe, ranks: int = 2, heartbeat: float = 30.0, **kwargs: Any) -> WorkerGroup:
        shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=ranks, threads_per_rank=1)
        deadlines = Deadlines(start_seconds=120.0, heartbeat_seconds=heartbeat, collective_seconds=120.0)
        return BACKENDS[backend](worker_class, shape, env=ENV, deadlines=deadlines, **kwargs)

    return start_group


@pytest.fixture(scope="session")
def solo(start: Start, backend: str) -> Start:
    """Start one rank without a process group; on the local backend in a thread of this process, which takes no time."""

    def start_group(worker_class: type[Worker] = Probe, heartbeat: float = 30.0) -> WorkerGroup:
        in_process = {"in_process": True} if backend == "local" else {}
        return start(worker_class, ranks=1, heartbeat=heartbeat, process_group=False, **in_process)

    return start_group

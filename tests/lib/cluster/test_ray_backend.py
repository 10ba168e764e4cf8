"""What holds on Ray beyond the laws of every group."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import ray

from lib.cluster.group import Deadlines
from lib.cluster.ray_backend import START_ATTEMPTS, RayGroup, start_ray
from lib.config.parallel import ClusterShape
from lib.core.errors import InfraError, WorkerDiedError
from tests.lib.cluster.workers import Probe

REPOSITORY = Path(__file__).resolve().parents[3]
RAY_PORTS = (6379, 8265, 10001)
"""Ray's own defaults."""


def test_a_killed_driver_leaves_no_process(tmp_path: Path) -> None:
    """[J1, J4] Ray's default ports are taken, and a Ray with one CPU is there already: two ranks of four threads still start
    and sum 1 + 2; SIGKILL of their driver then ends them and its Ray (whose two agents notice after a minute)."""
    with ExitStack() as stack:
        for port in RAY_PORTS:
            taken = stack.enter_context(socket.socket())
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if taken.connect_ex(("127.0.0.1", port)) != 0:
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
        driver = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "tests.lib.cluster.driver"],
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.PIPE,
                stderr=(tmp_path / "stderr").open("w"),
                text=True,
            )
        )
        assert driver.stdout is not None
        line = next((line for line in driver.stdout if line.startswith("{")), None)
        assert line is not None, (tmp_path / "stderr").read_text()
        found = json.loads(line)
        assert found["sums"] == [3.0, 3.0]
        agents: list[psutil.Process] = []
        family: list[psutil.Process] = []
        for process in psutil.Process(driver.pid).children(recursive=True):
            (agents if process.name().startswith(("ray::DashboardA", "ray::RuntimeEnv")) else family).append(process)
        assert {process.pid for process in family} >= set(found["pids"])
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    _, alive = psutil.wait_procs(family, timeout=30.0)
    running = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in running + [agent for agent in agents if agent.is_running()]:
        process.kill()
    assert not running


@pytest.mark.usefixtures("ray_here")
def test_a_cluster_without_room_says_so_and_keeps_nothing() -> None:
    """[J1] No GPU here: the request ends at the start deadline, names what is free, and its reservation is withdrawn."""
    shape = ClusterShape(nodes=1, gpus_per_node=1, ranks_per_node=1, threads_per_rank=1)
    if ray.cluster_resources().get("GPU"):
        shape = shape.model_copy(update={"gpus_per_node": 1024, "ranks_per_node": 1024})
    with pytest.raises(InfraError, match=r"Ray did not give 1 node.*GPU.*within 2 s; free now"):
        RayGroup(Probe, shape, env={}, deadlines=Deadlines(start_seconds=2.0))
    states = {table["state"] for table in ray.util.placement_group_table().values()}
    assert states <= {"REMOVED"}


@pytest.mark.usefixtures("ray_here")
def test_a_ray_that_lost_its_node_is_started_again() -> None:
    """[J1] SIGKILL of the node's process ends a group's ranks with it; the next group finds a Ray, and room, again."""
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=2, threads_per_rank=1)
    deadlines = Deadlines(start_seconds=120.0, heartbeat_seconds=20.0, collective_seconds=60.0)
    with RayGroup(Probe, shape, env={}, deadlines=deadlines) as group, pytest.raises(WorkerDiedError):
        for process in psutil.Process().children(recursive=True):
            if process.name() == "raylet":
                process.kill()
        group.call("train", 60.0, deadline_seconds=90.0)
    sums = None
    for _ in range(3):
        try:
            with RayGroup(Probe, shape, env={}, deadlines=deadlines) as group:
                sums = group.call("all_reduce", deadline_seconds=60.0)
            break
        except WorkerDiedError:  # Ray needs a while to see that the node is gone; a supervisor starts again likewise
            continue
    assert sums == [3.0, 3.0]


@pytest.mark.parametrize("num_timeouts", [0, START_ATTEMPTS - 1, START_ATTEMPTS])
def test_a_slow_start_is_tried_again_and_nothing_else_is(num_timeouts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives its node 30 s to start, which a busy machine may exceed: so many attempts, then an error that says so.
    Any other failure is raised at once, as it is."""
    started: list[int] = []

    def init(**_: object) -> None:
        started.append(len(started))
        if len(started) <= num_timeouts:
            raise Exception("The current node timed out during startup")  # Ray's own kind and text

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", init)
    if num_timeouts == START_ATTEMPTS:
        with pytest.raises(InfraError, match=f"didn't start in {START_ATTEMPTS} attempts: The current node timed out"):
            start_ray(1)
        assert len(started) == START_ATTEMPTS
        return
    start_ray(1)
    assert len(started) == num_timeouts + 1

    def fail(**_: object) -> None:
        raise ValueError("no such option")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ValueError, match="no such option"):
        start_ray(1)

"""Faults of a Ray cluster: ranks killed and stopped, the node's process killed, the driver killed.

Two ranks train in a loop of collectives. After the fault the driver must raise within a minute, naming the rank, and half a
minute later no process and no reserved CPU may be left. A killed driver can raise nothing; its processes must go.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from lib.cluster.group import Deadlines
from lib.cluster.ray_backend import RayGroup
from lib.config.parallel import ClusterShape
from lib.core.errors import InfraError
from tests.lib.cluster.workers import Probe

REPOSITORY = Path(__file__).resolve().parents[2]
FAULTS = ("kill", "stop", "kill", "stop", "kill", "stop", "kill", "stop", "node", "driver")
"""In turn."""
SHAPE = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=2, threads_per_rank=1)
DEADLINES = Deadlines(start_seconds=120.0, heartbeat_seconds=15.0, collective_seconds=120.0)
HANG_SECONDS, LEAK_SECONDS = 60.0, 30.0
START_ATTEMPTS = 4
AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")
"""Ray's own, which notice after a minute that their node is gone."""


@dataclass
class Trial:
    """One fault and what came of it."""

    fault: str
    rank: int
    seconds_to_error: float = 0.0
    error: str = ""
    num_leaked: int = 0
    """Processes, and reserved CPUs, that were left."""
    problem: str = ""


def run_drill(_root: Path, num_trials: int, *, seed: int) -> dict[str, Any]:
    """Returns the figures that `python -m tests.faults --kind ray` prints, with a line a trial on stderr."""
    rng = random.Random(seed)
    trials = []
    for number in range(num_trials):
        trial = Trial(FAULTS[number % len(FAULTS)], rng.randrange(SHAPE.num_ranks))
        try:
            (_kill_driver if trial.fault == "driver" else _harm_group)(trial, rng)
        except (InfraError, TimeoutError, AssertionError) as error:
            trial.problem = f"{type(error).__name__}: {error}"
        print(f"trial {number + 1}/{num_trials}: {asdict(trial)}", file=sys.stderr, flush=True)
        trials.append(trial)
    ray.shutdown()
    hangs = sum(trial.seconds_to_error > HANG_SECONDS for trial in trials)
    return {
        "kind": "ray",
        "trials": num_trials,
        "survived": sum(not trial.problem and trial.num_leaked == 0 for trial in trials),
        "kills": num_trials,
        "hangs": hangs,
        "leaks": sum(trial.num_leaked for trial in trials),
        "details": {
            "seed": seed,
            "max_seconds_to_error": max(trial.seconds_to_error for trial in trials),
            "problems": [asdict(trial) for trial in trials if trial.problem or trial.num_leaked],
        },
    }


def _harm_group(trial: Trial, rng: random.Random) -> None:
    group = _started()
    pids = [one["pid"] for one in group.call("identity", deadline_seconds=60.0)]
    nodes = [process for process in psutil.Process().children(recursive=True) if process.name() == "raylet"]
    delay, sent_at = rng.random(), 0.0

    def harm(_events: list[dict[str, Any]]) -> None:
        nonlocal sent_at
        if not sent_at:
            time.sleep(delay)
            sent_at = time.monotonic()
            for pid in [node.pid for node in nodes] if trial.fault == "node" else [pids[trial.rank]]:
                os.kill(pid, signal.SIGSTOP if trial.fault == "stop" else signal.SIGKILL)

    try:
        group.call("train", 120.0, deadline_seconds=2 * HANG_SECONDS, on_events=harm)
        trial.problem = "no error"
    except InfraError as error:
        trial.error = str(error)
    trial.seconds_to_error = round(time.monotonic() - sent_at, 1)
    if trial.seconds_to_error > HANG_SECONDS:
        trial.problem = "hung"
    if trial.fault != "node" and f"rank {trial.rank} of {SHAPE.num_ranks}" not in trial.error:
        trial.problem = trial.problem or "the error names another rank"
    trial.num_leaked = _leaked(pids, with_cpus=trial.fault != "node")


def _started() -> RayGroup:
    """A group; tried again where Ray has just lost its node, as a supervisor does."""
    for attempt in range(START_ATTEMPTS):
        try:
            return RayGroup(Probe, SHAPE, env={"OMP_NUM_THREADS": "1"}, deadlines=DEADLINES)
        except InfraError:
            if attempt == START_ATTEMPTS - 1:
                raise
    raise AssertionError("not reached")


def _leaked(pids: list[int], *, with_cpus: bool) -> int:
    end = time.monotonic() + LEAK_SECONDS
    while True:
        left = sum(_runs(pid) for pid in pids)
        if with_cpus:
            left += int(ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0))
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill_driver(trial: Trial, rng: random.Random) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.lib.cluster.driver"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as driver:
        assert driver.stdout is not None
        line = next((line for line in driver.stdout if line.startswith("{")), None)
        if line is None:
            raise InfraError("the driver ended before its ranks were up")
        time.sleep(rng.random())
        children = psutil.Process(driver.pid).children(recursive=True)
        agents = [child for child in children if child.name().startswith(AGENTS)]
        family = [child.pid for child in children if child not in agents]
        assert set(json.loads(line)["pids"]) <= set(family), "the ranks aren't the driver's"
        driver.kill()
    trial.num_leaked = _leaked(family, with_cpus=False)
    for agent in agents:
        if agent.is_running():
            agent.kill()

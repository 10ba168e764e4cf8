"""A worker group of Ray actors in a placement group: one actor a rank, on this machine or over a cluster's nodes."""

import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it is imported

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lib.cluster.group import FORWARDED_ENV, Deadlines, OnEvents, RankInfo, Worker, rank_infos
from lib.cluster.host import Host, worker_path
from lib.cluster.local import LOOPBACK
from lib.cluster.processes import end_trees, exit_cause, oom_kills
from lib.cluster.stop import Stop
from lib.cluster.watch import Message, Watch
from lib.config.parallel import ClusterShape
from lib.core.errors import InfraError, WorkerDiedError

OBJECT_STORE_BYTES = 256 * 1024**2
"""Of a Ray that we start: only plain values travel through it."""
START_ATTEMPTS = 3
NODE_CHECK_SECONDS = 5.0
"""How often a group that waits for room looks whether there are nodes left to give it."""
START_TIMEOUT_TEXT = "timed out during startup"
_LOGGER = logging.getLogger(__name__)

_OOM_TEXTS = ("memory monitor", "running low on memory", "OutOfMemory")
_GUESSES = re.compile(r"\s*(Some common causes include|There are some potential root causes).*", re.DOTALL)
"""Ray's list of what might have been, want of memory always among it."""


class RayGroup:
    """A `WorkerGroup` on Ray (see there)."""

    def __init__(
        self,
        worker_class: type[Worker],
        shape: ClusterShape,
        *,
        env: Mapping[str, str],
        deadlines: Deadlines,
        process_group: bool = True,
    ) -> None:
        """Raises WorkerDiedError when a rank dies or doesn't start in time, InfraError when Ray has no room for it."""
        start_ray(shape.ranks_per_node * shape.threads_per_rank)
        infos = rank_infos(shape, one_device_visible=True)
        one_node = shape.nodes == 1
        forwarded = {name: os.environ[name] for name in FORWARDED_ENV if name in os.environ}
        actor_env = {**forwarded, **(LOOPBACK if one_node else {}), **env}
        actors = _Actors(worker_path(worker_class), infos, shape, actor_env, deadlines.start_seconds)
        self._watch = Watch(actors, worker_class, shape.num_ranks, deadlines)
        try:
            address = None if not process_group else "127.0.0.1" if one_node else actors.address(0, deadlines.start_seconds)
        except BaseException:
            self._watch.close()
            raise
        self._watch.start(address)

    @property
    def num_ranks(self) -> int:
        return self._watch.num_ranks

    def call(
        self,
        method: str,
        *args: Any,
        deadline_seconds: float,
        on_events: OnEvents | None = None,
        stop: Stop | None = None,
    ) -> Any:
        return self._watch.call(method, args, deadline_seconds, on_events, stop or Stop())

    def close(self) -> None:
        self._watch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def start_ray(num_cpus: int) -> None:
    """Use the Ray that this process has joined; else the cluster that $RAY_ADDRESS names; else start one here.

    A Ray that happens to run on this machine is not joined unasked: it may be another user's, or half dead. One that this
    process has joined and that has lost all its nodes is left, and another is started or joined in its place.
    """
    if ray.is_initialized():
        if _has_nodes():
            return
        _LOGGER.warning("Ray has lost all its nodes; starting again without them")
        ray.shutdown()
    quiet = {"include_dashboard": False, "logging_level": logging.WARNING}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        return
    num_cpus = max(num_cpus, os.cpu_count() or 1)
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(address="local", num_cpus=num_cpus, object_store_memory=OBJECT_STORE_BYTES, **quiet)
            return
        except Exception as error:  # Ray raises plain Exception when a busy machine outlasts its fixed 30 s
            ray.shutdown()
            if START_TIMEOUT_TEXT not in str(error):
                raise
            if attempt == START_ATTEMPTS:
                raise InfraError(f"Ray didn't start in {attempt} attempts: {error}; is the machine overloaded?") from error
            _LOGGER.warning("Ray didn't start (%s); attempt %d of %d", error, attempt + 1, START_ATTEMPTS)


@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"control": 1})
class _RankActor:
    """A `Host` as an actor: requests in one thread, pulses in another."""

    def __init__(self, path: str, info: dict[str, Any]) -> None:
        self._host = Host(path, info)
        self._host.stop.listen()  # Ray runs this, and nothing after it, in the main thread

    def request(self, kind: str, args: list[Any]) -> dict[str, Any]:
        return self._host.request(kind, args)

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def pulse(self, stop: bool) -> dict[str, Any]:
        return {**self._host.pulse(stop), "node_id": ray.get_runtime_context().get_node_id()}

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def address(self) -> str:
        return str(ray.util.get_node_ip_address())


class _Actors:
    """The transport: actors, their placement group, and what is awaited of them."""

    def __init__(
        self, path: str, infos: list[RankInfo], shape: ClusterShape, env: Mapping[str, str], start_seconds: float
    ) -> None:
        self._oom_kills = oom_kills()
        self._awaited: dict[ray.ObjectRef[Any], tuple[int, str]] = {}
        self._identities: dict[int, tuple[str, int, float]] = {}
        self._died: set[int] = set()
        self._node_id = ray.get_runtime_context().get_node_id()
        cpus = _cpus_per_rank(shape)
        self._placement = _place(shape, cpus, start_seconds)
        self._actors = [
            _RankActor.options(  # type: ignore[attr-defined]
                num_cpus=cpus,
                num_gpus=1 if shape.gpus_per_node else 0,
                runtime_env={"env_vars": dict(env)},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, info.node_rank),
            ).remote(path, asdict(info))
            for info in infos
        ]

    def address(self, rank: int, timeout_seconds: float) -> str:
        """Of the node that the rank runs on."""
        try:
            return str(ray.get(self._actors[rank].address.remote(), timeout=timeout_seconds))
        except RayError as error:
            raise InfraError(f"rank {rank} did not start: {_cause(error, 0)}") from error

    def request(self, rank: int, kind: str, args: list[Any]) -> None:
        self._awaited[self._actors[rank].request.remote(kind, args)] = (rank, "outcome")

    def pulse(self, rank: int, *, stop: bool) -> None:
        self._awaited[self._actors[rank].pulse.remote(stop)] = (rank, "pulse")

    def poll(self, timeout_seconds: float) -> list[Message]:
        if not self._awaited:
            time.sleep(timeout_seconds)
            return []
        ray.wait(list(self._awaited), num_returns=1, timeout=timeout_seconds)
        ready, _ = ray.wait(list(self._awaited), num_returns=len(self._awaited), timeout=0)
        heard = [self._message(ref, *self._awaited.pop(ref)) for ref in ready]
        return [message for message in heard if message is not None]

    def close(self) -> None:
        """Stopped processes don't obey Ray, so those of this machine are ended by their ids as well."""
        for actor in self._actors:
            _kill(actor)
        remove_placement_group(self._placement)
        here = [(pid, created) for node_id, pid, created in self._identities.values() if node_id == self._node_id]
        end_trees(here)
        self._awaited.clear()

    def _message(self, ref: "ray.ObjectRef[Any]", rank: int, kind: str) -> Message | None:
        if rank in self._died:
            return None
        try:
            body: dict[str, Any] = ray.get(ref)
        except RayError as error:
            self._died.add(rank)
            return Message(rank, "died", {"message": _cause(error, oom_kills() - self._oom_kills)})
        if kind == "pulse":
            self._identities[rank] = (body["node_id"], body["pid"], body["created"])
            return Message(rank, "pulse", body)
        return Message(rank, "outcome", body)


def _place(shape: ClusterShape, cpus: float, start_seconds: float) -> PlacementGroup:
    """One bundle a node, so that a node's ranks stay together.

    Raises:
        InfraError: the cluster has no room in time; nothing stays reserved.
        WorkerDiedError: the cluster has lost all its nodes.
    """
    bundle = {"CPU": cpus * shape.ranks_per_node, **({"GPU": float(shape.gpus_per_node)} if shape.gpus_per_node else {})}
    placement = placement_group([bundle] * shape.nodes, strategy="STRICT_SPREAD" if shape.nodes > 1 else "PACK")
    ready = placement.ready()
    deadline = time.monotonic() + start_seconds
    try:
        while not ray.wait([ready], timeout=min(NODE_CHECK_SECONDS, max(0.0, deadline - time.monotonic())))[0]:
            if not _has_nodes():
                raise WorkerDiedError("Ray lost all its nodes before the ranks could start")
            if time.monotonic() >= deadline:
                raise GetTimeoutError("no room in time")
        ray.get(ready)
    except (GetTimeoutError, RayError) as error:
        free = ray.available_resources()
        remove_placement_group(placement)
        raise InfraError(
            f"Ray did not give {shape.nodes} node(s) with {bundle} within {start_seconds:.0f} s; free now: "
            f"CPU {free.get('CPU', 0)}, GPU {free.get('GPU', 0)}; free some or ask for fewer"
        ) from error
    except BaseException:
        remove_placement_group(placement)
        raise
    return placement


def _has_nodes() -> bool:
    return any(node["Alive"] for node in ray.nodes())


def _cpus_per_rank(shape: ClusterShape) -> float:
    """CPUs reserved for a rank: its threads; or an equal share of the only node, where they are more than it has."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 and shape.nodes == 1:
        share = nodes[0]["Resources"].get("CPU", 1.0) / shape.num_ranks
        return min(float(shape.threads_per_rank), int(share * 10_000) / 10_000)
    return float(shape.threads_per_rank)


def _kill(actor: "ActorHandle[Any]") -> None:
    try:
        ray.kill(actor)
    except (RayError, ValueError):  # it was never scheduled, or Ray is gone
        return


def _cause(error: RayError, new_oom_kills: int) -> str:
    """Why an actor can't be reached, in words."""
    text = _GUESSES.sub("", str(error)).strip()
    if isinstance(error, OutOfMemoryError) or any(hint in text for hint in _OOM_TEXTS):
        return f"out of memory: Ray ended it because its machine ran low; {text}"
    if new_oom_kills > 0:
        return exit_cause(None, new_oom_kills)
    if isinstance(error, RayActorError) and "connection error code" in text:
        return f"its process was killed or crashed: {text}"
    return text

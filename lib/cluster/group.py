"""What a group of worker processes is: the worker, how its methods are declared, and the handle that a driver holds.

A recipe's worker is a subclass of `Worker`; each method that the driver may call says with `@dispatch` how arguments are
split over the ranks and how results are merged. Only plain values (JSON values and paths) cross the process boundary.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

from lib.cluster.stop import Stop
from lib.config.parallel import ClusterShape

Event = dict[str, Any]
OnEvents = Callable[[list[Event]], None]

FORWARDED_ENV = (
    "POSTFLYTE_HOME",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_TOKEN",
    "HF_HOME",
    "HF_TOKEN",
    "HF_HUB_OFFLINE",
    "TMPDIR",
)
"""Variables of the driver that every worker sees, also where its process descends from another one."""

_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class RankInfo:
    """A worker's place in its group."""

    rank: int
    """0 to num_ranks - 1."""
    num_ranks: int
    local_rank: int
    """Place among the ranks of the same node."""
    node_rank: int
    device: str
    """A torch device: "cpu" or "cuda:<index>"."""
    master_addr: str = ""
    """Where rank 0 keeps the rendezvous store; empty in a group without a process group."""
    master_port: int = 0


@dataclass(frozen=True)
class Deadlines:
    """Bounds of every wait on a group."""

    start_seconds: float = 300.0
    """For all ranks to be placed, to import their code and to join the process group."""
    heartbeat_seconds: float = 45.0
    """A rank that leaves a pulse unanswered for this long is dead."""
    collective_seconds: float = 1800.0
    """A torch.distributed collective that takes longer fails."""


@dataclass(frozen=True)
class Dispatch:
    """How the driver's call of a worker method becomes one call on each rank, and the results one result."""

    split: Literal["same", "by_rank"]
    """"same": every rank gets the arguments as they are. "by_rank": each is a list [num_ranks], a rank gets its item."""
    merge: Literal["rank0", "all", "sum"]
    """"rank0": rank 0's result. "all": the list of results by rank. "sum": the sum of numbers, or of dicts key by key, where a
    key that a rank lacks is 0."""
    events: Literal["rank0", "all"]
    """Whose events reach the driver's `on_events`."""


def dispatch(
    *,
    split: Literal["same", "by_rank"] = "same",
    merge: Literal["rank0", "all", "sum"] = "rank0",
    events: Literal["rank0", "all"] = "rank0",
) -> Callable[[_Method], _Method]:
    """Declare a worker method that the driver may call (see `Dispatch`)."""

    def declare(method: _Method) -> _Method:
        method.__dispatch__ = Dispatch(split, merge, events)  # type: ignore[attr-defined]
        return method

    return declare


def declaration_of(worker_class: "type[Worker]", method: str) -> Dispatch:
    """The declaration of a method.

    Raises:
        TypeError: there is no such method, or it isn't declared with `@dispatch`.
    """
    declared = getattr(getattr(worker_class, method, None), "__dispatch__", None)
    if not isinstance(declared, Dispatch):
        raise TypeError(f"{worker_class.__name__}.{method} is not a method declared with @dispatch")
    return declared


class Worker:
    """Base of all workers: one rank, built in its own process before any of its methods is called."""

    def __init__(self, info: RankInfo) -> None:
        self.info = info
        self._events: list[Event] = []
        self._events_lock = threading.Lock()
        self.stop = Stop()
        """Asked for by the driver or by SIGTERM; long work that heeds it saves what it has and raises PreemptedError."""

    def emit(self, event: Event) -> None:
        """Send a plain dict to the driver's `on_events`, in order, while the method goes on."""
        check_plain(event, "event")
        with self._events_lock:
            self._events.append(event)

    def drain_events(self) -> list[Event]:
        """Events emitted since the last time; called by the group's machinery."""
        with self._events_lock:
            drained, self._events = self._events, []
        return drained


class WorkerGroup(Protocol):
    """N running workers. Leaving the `with` block, or any failed call, ends them all and leaves nothing behind."""

    @property
    def num_ranks(self) -> int: ...

    def call(
        self,
        method: str,
        *args: Any,
        deadline_seconds: float,
        on_events: OnEvents | None = None,
        stop: Stop | None = None,
    ) -> Any:
        """Call a declared method on every rank and merge the results.

        deadline_seconds: longest wait without an event or a result of any rank; each event starts it anew.
        stop: once requested, all ranks are asked to stop.

        Raises:
            PreemptedError: the ranks were asked to stop and didn't end in the time that was left.
            WorkerDiedError: a rank died, stopped answering or missed the deadline; names rank and cause.
            PostflyteError: raised by a rank with the same class; the message names the rank.
            RuntimeError: any other exception of a rank, with its traceback.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class GroupFactory(Protocol):
    """`RayGroup`, `LocalGroup`, or either with some arguments filled in."""

    def __call__(
        self,
        worker_class: type[Worker],
        shape: ClusterShape,
        *,
        env: Mapping[str, str],
        deadlines: Deadlines,
        process_group: bool = True,
    ) -> WorkerGroup: ...


def split_args(declared: Dispatch, args: Sequence[Any], num_ranks: int) -> list[list[Any]]:
    """[num_ranks] argument lists.

    Raises:
        TypeError: an argument isn't plain, or under "by_rank" isn't a list with one item for each rank.
    """
    for arg in args:
        check_plain(arg, "argument")
    if declared.split == "same":
        return [list(args) for _ in range(num_ranks)]
    for arg in args:
        if not isinstance(arg, list) or len(arg) != num_ranks:
            raise TypeError(f"an argument split by rank must be a list of {num_ranks} items, found {str(arg)[:80]}")
    return [[arg[rank] for arg in args] for rank in range(num_ranks)]


def merge_results(declared: Dispatch, results: Sequence[Any]) -> Any:
    """One result from the [num_ranks] results."""
    if declared.merge == "rank0":
        return results[0]
    if declared.merge == "all":
        return list(results)
    if isinstance(results[0], dict):
        return {key: sum(result.get(key, 0) for result in results) for key in dict.fromkeys(chain(*results))}
    return sum(results)


def check_plain(value: object, what: str) -> None:
    """Raises TypeError unless `value` is made of JSON values (tuples count as lists) and paths."""
    if value is None or isinstance(value, (bool, int, float, str, Path)):
        return
    if isinstance(value, (list, tuple)):
        for item in value:
            check_plain(item, what)
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{what}: key {key!r} is not a string; only JSON values and paths cross processes")
            check_plain(item, what)
        return
    raise TypeError(f"{what}: a {type(value).__name__} can't cross processes; send JSON values and paths")


def rank_infos(shape: ClusterShape, *, one_device_visible: bool) -> list[RankInfo]:
    """[num_ranks] node by node. `one_device_visible`: each process sees its own GPU only, so that is number 0."""
    infos = []
    for rank in range(shape.num_ranks):
        node_rank, local_rank = divmod(rank, shape.ranks_per_node)
        device = "cpu" if shape.device == "cpu" else f"cuda:{0 if one_device_visible else local_rank}"
        infos.append(RankInfo(rank, shape.num_ranks, local_rank, node_rank, device))
    return infos

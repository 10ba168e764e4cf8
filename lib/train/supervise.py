"""The driver's loop around a group of workers: start, train, and after a death start again from the last checkpoint."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lib.cluster.group import Deadlines, Event, GroupFactory, Worker
from lib.cluster.stop import Stop
from lib.config.parallel import ClusterConfig, ClusterShape
from lib.config.train import TrainConfig
from lib.core.errors import ConfigError, PreemptedError, WorkerDiedError
from lib.core.manifest import Json
from lib.train.checkpoint import latest_valid, read_facts, step_name
from lib.train.environment import cpu_environment
from lib.train.shelf import Shelf

CHECKPOINTS = "checkpoints"
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """One start of a group of ranks."""

    step: int
    """Of the checkpoint that it goes on from; 0: it begins at the beginning."""
    token: str
    """Names it: what it writes to the run's shelf is kept apart from what other starts write."""


class Progress(Protocol):
    """Shows how far a run is: the number of steps done, and figures beside it."""

    def __call__(self, count: int, /, **figures: float | str) -> None: ...


def tell(progress: Progress, event: Event) -> None:
    """Show an event, of which each has "kind" and "step": a "step", a "phase" or a "restart"."""
    if event["kind"] == "step":
        shown = {"tok/s": event["tokens_per_second"], "mfu": event["mfu"], "eta_s": event["eta_seconds"]}
        progress(event["step"], loss=event["loss"], **shown)
    else:
        progress(event["step"], **{event["kind"]: event.get("phase") or str(event["restarts"])})


def resume_step(shelf: Shelf, identity: str) -> int:
    """Step of the newest checkpoint that can be believed; 0 to begin at the beginning. Call while holding the run's lock.

    Raises:
        ConfigError: the shelf holds checkpoints of another job.
    """
    step = latest_valid(shelf)
    if step is None:
        return 0
    found = read_facts(shelf.open(step_name(step)))["identity"]
    if found != identity:
        raise ConfigError(
            f"{shelf}: holds checkpoints of another job ({found[:12]}, this one is {identity[:12]}); use another run folder"
        )
    return step


def train_with_restarts(
    worker_class: type[Worker],
    arguments: Callable[[Start], list[Json]],
    *,
    shape: ClusterShape,
    cluster: ClusterConfig,
    train: TrainConfig,
    begin: Callable[[], Start],
    group_factory: GroupFactory,
    on_event: Callable[[Event], None],
) -> Json:
    """Call `train` on a group, again after each death of a worker, at most `train.max_restarts` times.

    Args:
        arguments: of the worker's `train`, for a start.
        begin: asked before every start where it goes on from.
    Returns:
        Rank 0's result, with "restarts".
    Raises:
        PreemptedError: SIGTERM came, to this process or to a rank; what has been done is saved if there was time for it.
        WorkerDiedError: workers died once too often. Other errors of a rank are passed on and not tried again.
    """
    deadlines = Deadlines(cluster.start_deadline_seconds, cluster.heartbeat_seconds, train.step_deadline_seconds)
    env = cpu_environment(shape.threads_per_rank)

    def pass_on(events: list[Event]) -> None:
        for event in events:
            on_event(event)

    restarts, stop = 0, Stop(train.grace_seconds)
    while True:
        start = begin()
        try:
            # The handler comes after the group: Ray sets one of its own when it starts.
            with group_factory(worker_class, shape, env=env, deadlines=deadlines) as group, stop.on_sigterm():
                seconds = train.step_deadline_seconds
                result: Json = group.call("train", *arguments(start), deadline_seconds=seconds, on_events=pass_on, stop=stop)
                return {**result, "restarts": restarts}
        except WorkerDiedError as error:
            if stop.requested:
                raise PreemptedError(f"asked to stop by SIGTERM, and then {error}") from error
            if restarts == train.max_restarts:
                raise
            restarts += 1
            _LOGGER.warning("%s; start %d of at most %d", error, restarts + 1, train.max_restarts + 1)
            on_event({"kind": "restart", "restarts": restarts, "step": start.step, "cause": str(error)})

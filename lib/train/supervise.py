"""The driver's loop around a group of workers: start, train, and after a death start again from the last checkpoint."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lib.cluster.group import Deadlines, Event, GroupFactory, Worker
from lib.cluster.stop import Stop
from lib.config.parallel import ClusterConfig, ClusterShape
from lib.config.train import TrainConfig
from lib.core.artifact import remove_stale_staging
from lib.core.errors import ConfigError, PreemptedError, WorkerDiedError
from lib.core.manifest import Json
from lib.train.checkpoint import checkpoint_folder, latest_valid, read_facts
from lib.train.environment import cpu_environment

CHECKPOINTS = "checkpoints"
_LOGGER = logging.getLogger(__name__)


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


def resume_step(run_dir: Path, identity: str) -> int:
    """Step of the newest checkpoint that can be believed; 0 to begin at the beginning. Call while holding the run's lock.

    Raises:
        ConfigError: the folder holds a run of another job.
    """
    root = run_dir / CHECKPOINTS
    root.mkdir(parents=True, exist_ok=True)
    remove_stale_staging(root)
    step = latest_valid(root)
    if step is None:
        return 0
    found = read_facts(checkpoint_folder(root, step))["identity"]
    if found != identity:
        raise ConfigError(
            f"{run_dir}: holds checkpoints of another job ({found[:12]}, this one is {identity[:12]}); use another run folder"
        )
    return step


def train_with_restarts(
    worker_class: type[Worker],
    arguments: Callable[[int], list[Json]],
    *,
    shape: ClusterShape,
    cluster: ClusterConfig,
    train: TrainConfig,
    start_at: Callable[[], int],
    group_factory: GroupFactory,
    on_event: Callable[[Event], None],
) -> Json:
    """Call `train` on a group, again after each death of a worker, at most `train.max_restarts` times.

    Args:
        arguments: step to go on after (0: none) -> arguments of the worker's `train`.
        start_at: that step, asked for before every start.
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
        step = start_at()
        try:
            # The handler comes after the group: Ray sets one of its own when it starts.
            with group_factory(worker_class, shape, env=env, deadlines=deadlines) as group, stop.on_sigterm():
                seconds = train.step_deadline_seconds
                result: Json = group.call("train", *arguments(step), deadline_seconds=seconds, on_events=pass_on, stop=stop)
                return {**result, "restarts": restarts}
        except WorkerDiedError as error:
            if stop.requested:
                raise PreemptedError(f"asked to stop by SIGTERM, and then {error}") from error
            if restarts == train.max_restarts:
                raise
            restarts += 1
            _LOGGER.warning("%s; start %d of at most %d", error, restarts + 1, train.max_restarts + 1)
            on_event({"kind": "restart", "restarts": restarts, "step": step, "cause": str(error)})

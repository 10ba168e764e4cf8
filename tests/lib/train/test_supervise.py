"""Laws of the restart loop: from the newest checkpoint each time, as often as allowed, then an error that names the rank."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lib.cluster.local import LocalGroup
from lib.config.parallel import ClusterConfig, ClusterShape
from lib.config.train import TrainConfig
from lib.core.errors import ConfigError, WorkerDiedError
from lib.core.manifest import Json
from lib.train.checkpoint import CheckpointStore
from lib.train.folder_shelf import FolderShelf
from lib.train.retention import Retention
from lib.train.state import Piece, TrainState, Values
from lib.train.supervise import Start, resume_step, tell, train_with_restarts
from tests.lib.train.dying_worker import DyingWorker


def _train(root: Path, *, deaths: int, max_restarts: int, events: list[Json]) -> Json:
    steps = iter(range(0, 100, 10))
    return train_with_restarts(
        DyingWorker,
        lambda start: [str(root / "starts"), deaths, start.step],  # type: ignore[list-item]
        shape=ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=1, threads_per_rank=1),
        cluster=ClusterConfig(),
        train=TrainConfig(max_restarts=max_restarts, step_deadline_seconds=300.0),
        begin=lambda: Start(next(steps), "token"),
        group_factory=LocalGroup,
        on_event=events.append,
    )


@pytest.mark.timeout(600)
def test_deaths_are_survived_as_often_as_allowed(tmp_path: Path) -> None:
    """One death of one allowed: started at 0, then at the step that is asked for anew. One more death is the error."""
    events: list[Json] = []
    assert _train(tmp_path, deaths=1, max_restarts=1, events=events) == {"starts": 2, "restarts": 1}
    assert (tmp_path / "starts").read_text() == "0\n10\n"
    assert [(event["kind"], event["restarts"]) for event in events] == [("restart", 1)]
    with pytest.raises(WorkerDiedError, match="rank 0"):
        _train(tmp_path, deaths=9, max_restarts=0, events=events)


def test_resume_is_from_the_newest_checkpoint_of_the_same_run(tmp_path: Path) -> None:
    shelf = FolderShelf(tmp_path)
    assert resume_step(shelf, "mine") == 0
    state = TrainState()
    state.register("data", Values(dict, lambda values: None))
    state.register("weights", _Scalar())
    store = CheckpointStore(shelf, keep=Retention(1), rank=0, num_ranks=1)
    store.save_async(7, state, {"identity": "mine", "layout": {}, "loss": 1.0})
    store.wait_for_part()
    store.all_parts_written()
    store.wait_until_published()
    store.close()
    (tmp_path / ".staging-step-00000008-0").mkdir()
    shelf.claim("1")
    assert resume_step(shelf, "mine") == 7
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]
    with pytest.raises(ConfigError, match="checkpoints of another job"):
        resume_step(shelf, "other")


class _Scalar:
    """The least that has a tensor."""

    def pieces(self) -> dict[str, Any]:
        return {"one": Piece(torch.ones(1), (1,), (0,))}

    def values(self) -> Json:
        return {}

    def merge(self, values_of_ranks: list[Json]) -> Json:
        return {}

    def load(self, fetch: Any, values: Json) -> None:
        raise AssertionError("nothing is loaded here")


def test_events_become_progress() -> None:
    shown: list[tuple[int, dict[str, Any]]] = []
    speed = {"tokens_per_second": 9.0, "mfu": 0.5, "eta_seconds": 3.0}
    for event in (
        {"kind": "phase", "phase": "load", "step": 0},
        {"kind": "step", "step": 1, "loss": 2.0, **speed},
        {"kind": "restart", "restarts": 1, "step": 1, "cause": "rank 0 died"},
    ):
        tell(lambda count, /, **figures: shown.append((count, figures)), event)
    step = {"loss": 2.0, "tok/s": 9.0, "mfu": 0.5, "eta_s": 3.0}
    assert shown == [(0, {"phase": "load"}), (1, step), (1, {"restart": "1"})]

"""The checkpoint store under kills and a full disk, at every step of a save: nothing is lost, the bits are the same."""

import random
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

from lib.core.artifact import verify
from lib.train.checkpoint import KIND, published_steps, step_name
from lib.train.folder_shelf import FolderShelf
from tests.faults import store_drill, victim

NUM_RANDOM_KILLS = 12


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Children that have torch imported already."""
    return store_drill.server()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return victim.run(tmp_path_factory.mktemp("unharmed"))


def _all_valid(root: Path) -> list[int]:
    steps = published_steps(FolderShelf(root))
    for step in steps:
        verify(root / step_name(step), KIND)
    return steps


@pytest.mark.timeout(600)
def test_a_kill_at_every_event_of_saving_loses_nothing(
    processes: ForkServerContext, expected: torch.Tensor, tmp_path: Path
) -> None:
    """[F1] SIGKILL at every third file-system event of a run until it ends by itself: each child goes on where the one
    before was killed; every published checkpoint is whole, never fewer than before, and the final weights are the same bits.
    """
    root, kills, steps_before = tmp_path / "run", 0, 0
    for at_event in range(1, 400, 3):
        child = processes.Process(target=victim.run_killed, args=(str(root), at_event))
        child.start()
        child.join(60)
        steps = _all_valid(root) if root.exists() else []
        assert max(steps, default=0) >= steps_before
        steps_before = max(steps, default=0)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    assert child.exitcode == 0 and kills >= 10
    assert torch.equal(victim.run(root), expected)
    assert published_steps(FolderShelf(root)) == [victim.STEPS, victim.STEPS - 1]


@pytest.mark.timeout(600)
def test_kills_at_random_moments_lose_nothing(processes: ForkServerContext, expected: torch.Tensor, tmp_path: Path) -> None:
    """[F1] The same with the clock."""
    generator = random.Random(0)
    root = tmp_path / "run"
    for _ in range(NUM_RANDOM_KILLS):
        child = processes.Process(target=victim.run_killed, args=(str(root), 1 << 30))
        child.start()
        time.sleep(generator.uniform(0.0, 0.15))
        child.kill()
        child.join()
        if root.exists():
            _all_valid(root)
    assert torch.equal(victim.run(root), expected)


@pytest.mark.timeout(600)
def test_a_full_disk_at_every_write_keeps_a_whole_checkpoint(
    processes: ForkServerContext, expected: torch.Tensor, tmp_path: Path
) -> None:
    """[F2] ENOSPC from the n-th opening, making or renaming on, for every n: an error that says what to do, exit code 3,
    and what was published stays. With room again the run ends in the same bits.
    """
    root, failures = tmp_path / "run", 0
    victim_steps = 0
    for at_event in range(2, 200):
        child = processes.Process(target=victim.run_without_space, args=(str(root), at_event))
        child.start()
        child.join(60)
        steps = _all_valid(root) if root.exists() else []
        assert len(steps) >= min(victim_steps, 1)
        victim_steps = max(steps, default=0)
        if child.exitcode == 0:
            break
        assert child.exitcode in (3, 4)
        failures += child.exitcode == 3
    assert child.exitcode == 0 and failures >= 5
    assert torch.equal(victim.run(root), expected)


@pytest.mark.timeout(600)
def test_runs_killed_and_resumed_on_other_numbers_of_ranks_end_in_the_same_bits(tmp_path: Path) -> None:
    """[F1, F9] 20 trials of up to three kills, each start with 1, 2 or 4 ranks; `make faults KIND=store N=1000` makes more."""
    figures = store_drill.run_kills(tmp_path, 20, seed=3)
    assert figures["survived"] == 20 and figures["kills"] >= 20, figures


@pytest.mark.timeout(600)
def test_no_failing_call_costs_a_checkpoint(tmp_path: Path) -> None:
    """[F2] Every fourth case of `make faults KIND=io`: each kind of call fails, and files are cut short."""
    figures = store_drill.run_io_errors(tmp_path, every=4)
    assert figures["survived"] == figures["trials"] and figures["details"]["errors"].keys() == set(victim.CALLS), figures


@pytest.mark.timeout(600)
def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """[F2] 40 flips; `make faults KIND=bitflip N=500` makes more."""
    figures = store_drill.run_bitflips(tmp_path, 40, seed=1)
    assert figures["survived"] == 40, figures

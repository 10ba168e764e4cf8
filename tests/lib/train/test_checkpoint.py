"""Laws of checkpoints: whole or absent, believed only when every byte is right, readable by any number of ranks."""

import errno
import json
import os
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib.config.optim import OptimConfig
from lib.core.artifact import verify
from lib.core.errors import ArtifactCorruptError, InfraError
from lib.train.checkpoint import CheckpointStore, latest_valid, load_state, published_steps, read_facts, step_name
from lib.train.folder_shelf import FolderShelf, StoredFolder
from lib.train.optim import build_optimizer, set_learning_rate
from lib.train.retention import Retention
from lib.train.state import ModelAndOptimizer, Piece, RandomGenerators, TrainState, Values

FACTS: dict[str, Any] = {"identity": "run", "layout": {}, "loss": 1.0}


def small_run(seed: int = 0) -> tuple[TrainState, nn.Module, torch.optim.Optimizer, dict[str, int]]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    optimizer = build_optimizer(module, OptimConfig())
    set_learning_rate(optimizer, 1e-2)
    counters = {"tokens": 0}
    state = TrainState()
    state.register("model", ModelAndOptimizer(module, optimizer))
    state.register("random", RandomGenerators())
    state.register("counters", Values(lambda: dict(counters), counters.update))
    return state, module, optimizer, counters


def advance(module: nn.Module, optimizer: torch.optim.Optimizer, counters: dict[str, int]) -> float:
    """A step whose batch comes from all three random generators."""
    inputs = torch.randn(4, 5) + float(np.random.rand()) + random.random()
    optimizer.zero_grad()
    loss = module(inputs).square().mean()
    loss.backward()
    optimizer.step()
    counters["tokens"] += 4
    return loss.item()


def save(root: Path, step: int, state: TrainState, *, keep: int = 2) -> None:
    store = CheckpointStore(FolderShelf(root), keep=Retention(keep), rank=0, num_ranks=1)
    store.save_async(step, state, FACTS)
    store.wait_for_part()
    assert store.part_written()
    store.all_parts_written()
    store.wait_until_published()
    store.close()


def load(root: Path, state: TrainState) -> None:
    step = latest_valid(FolderShelf(root))
    assert step is not None
    load_state(StoredFolder(root / step_name(step)), state, rank=0, num_ranks=1, layout={})


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """[F5] Weights, buffers, moments, all random generators and counters are those of the run that went on."""
    state, module, optimizer, counters = small_run()
    for _ in range(3):
        advance(module, optimizer, counters)
    save(tmp_path, 3, state)
    expected = [advance(module, optimizer, counters) for _ in range(3)]

    resumed, module_2, optimizer_2, counters_2 = small_run(seed=99)
    np.random.seed(99), random.seed(99)
    set_learning_rate(optimizer_2, 1e-2)
    load(tmp_path, resumed)
    assert [advance(module_2, optimizer_2, counters_2) for _ in range(3)] == expected
    assert counters_2 == counters == {"tokens": 24}
    for name, piece in state.pieces().items():
        assert torch.equal(piece.local, resumed.pieces()[name].local), name


def test_a_ranks_own_values_go_back_only_to_the_same_layout(tmp_path: Path) -> None:
    """As many ranks may be laid out in another way: rank r then has other rows, so its generators stay as they were seeded and
    what all ranks know is merged. The weights come back either way."""
    state, module, *_ = small_run()
    save(tmp_path, 1, state)
    saved, weights = torch.get_rng_state(), {name: value.clone() for name, value in module.state_dict().items()}
    for layout, is_same in (({}, True), ({"tensor": 2}, False)):
        fresh, fresh_module, *_ = small_run(seed=1)
        seeded = torch.get_rng_state()
        load_state(StoredFolder(tmp_path / step_name(1)), fresh, rank=0, num_ranks=1, layout=layout)
        assert torch.equal(torch.get_rng_state(), saved if is_same else seeded)
        assert all(torch.equal(value, weights[name]) for name, value in fresh_module.state_dict().items())
    assert not torch.equal(saved, seeded)


def test_census_names_every_tensor_and_value() -> None:
    """[F5] 6 parameters with weight, two moments and a step each, 3 buffers, and the plain values: nothing else has state."""
    state, module, optimizer, counters = small_run()
    advance(module, optimizer, counters)
    census = state.census()
    names = [name for name, _ in module.named_parameters()]
    for kind in ("weight", "exp_avg", "exp_avg_sq", "step"):
        assert [f"model/{kind}/{name}" for name in sorted(names)] == [x for x in census if x.startswith(f"model/{kind}/")]
    buffers = ("num_batches_tracked", "running_mean", "running_var")
    assert [x for x in census if "/buffer/" in x] == [f"model/buffer/1.{name}" for name in buffers]
    assert {x for x in census if not x.startswith("model/")} == {
        *("counters/tokens", "random/python", "random/numpy", "random/torch", "random/cuda"),
    }
    assert len(census) == 4 * 6 + 3 + 1 + 5


def test_another_set_of_state_is_refused(tmp_path: Path) -> None:
    state, *_ = small_run()
    save(tmp_path, 1, state)
    state.register("more", Values(dict, lambda values: None))
    with pytest.raises(ValueError, match="the run needs"):
        load(tmp_path, state)


@settings(max_examples=30, deadline=None)
@given(num_rows=st.integers(0, 9), writers=st.integers(1, 5), readers=st.integers(1, 5))
def test_any_number_of_ranks_reads_what_another_wrote(
    tmp_path_factory: pytest.TempPathFactory, num_rows: int, writers: int, readers: int
) -> None:
    """[F5] A [num_rows, 2] tensor in torch.chunk's pieces (some empty), a scalar, and merged values."""
    root = tmp_path_factory.mktemp("run")
    whole = torch.arange(num_rows * 2, dtype=torch.float32).reshape(num_rows, 2)
    stores = [CheckpointStore(FolderShelf(root), keep=Retention(1), rank=rank, num_ranks=writers) for rank in range(writers)]
    for rank, store in enumerate(stores):
        store.save_async(7, _piece_state(whole, rank, writers, {"streams": {str(rank): rank * 10}})[0], FACTS)
    for store in stores:
        store.wait_for_part()
    for store in reversed(stores):
        store.all_parts_written()
    stores[0].wait_until_published()
    verify(root / step_name(7), "train_state")
    assert read_facts(StoredFolder(root / step_name(7))) == {**FACTS, "num_ranks": writers, "step": 7}
    for rank in range(readers):
        state, holder, got = _piece_state(torch.full_like(whole, -1), rank, readers, {})
        load_state(StoredFolder(root / step_name(7)), state, rank=rank, num_ranks=readers, layout={})
        begin, end = _chunk(num_rows, rank, readers)
        assert torch.equal(holder.tensor, whole[begin:end]) and holder.scalar.item() == 5.0
        merged = {str(r): r * 10 for r in range(writers)}
        assert got == {"streams": merged if writers != readers else {str(rank): rank * 10}}
    for store in stores:
        store.close()


def _chunk(num_rows: int, rank: int, num_ranks: int) -> tuple[int, int]:
    size = -(-num_rows // num_ranks)
    return min(rank * size, num_rows), min((rank + 1) * size, num_rows)


class _Holder:
    """A tensor of which a rank holds a piece, and a scalar that all hold."""

    def __init__(self, whole: torch.Tensor, rank: int, num_ranks: int) -> None:
        self.begin, end = _chunk(len(whole), rank, num_ranks)
        self.tensor, self.shape, self.scalar = whole[self.begin : end].clone(), tuple(whole.shape), torch.tensor(5.0)

    def pieces(self) -> dict[str, Piece]:
        return {"tensor": Piece(self.tensor, self.shape, (self.begin, 0)), "scalar": Piece(self.scalar, (), ())}

    def values(self) -> dict[str, object]:
        return {}

    def merge(self, values_of_ranks: list[dict[str, object]]) -> dict[str, object]:
        return {}

    def load(self, fetch: object, values: object) -> None:
        self.scalar = torch.zeros(())
        for name, piece in self.pieces().items():
            piece.local.copy_(fetch(name, piece.offset, tuple(piece.local.shape)))  # type: ignore[operator]


def _piece_state(
    whole: torch.Tensor, rank: int, num_ranks: int, values: dict[str, object]
) -> tuple[TrainState, _Holder, dict[str, object]]:
    state, holder = TrainState(), _Holder(whole, rank, num_ranks)
    state.register("piece", holder)
    merge = lambda each: {"streams": {k: v for one in each for k, v in one["streams"].items()}}  # noqa: E731
    state.register("data", Values(lambda: values, values.update, merge))
    return state, holder, values


def test_only_the_newest_are_kept_and_only_after_a_newer_one_is_there(tmp_path: Path) -> None:
    """[F2] [F11] keep = 2 of steps 1..5: 4 and 5 remain, whole."""
    state, *_ = small_run()
    for step in range(1, 6):
        save(tmp_path, step, state)
        assert published_steps(FolderShelf(tmp_path)) == sorted(range(max(1, step - 1), step + 1), reverse=True)
        for kept in published_steps(FolderShelf(tmp_path)):
            verify(tmp_path / step_name(kept))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_every_flipped_bit_is_found_and_the_run_goes_back(tmp_path: Path) -> None:
    """[F12] One bit at each of 120 random places over all files: never believed, the checkpoint before is."""
    state, module, optimizer, counters = small_run()
    for step in (1, 2):
        advance(module, optimizer, counters)
        save(tmp_path, step, state)
    files = sorted(path for path in (tmp_path / step_name(2)).iterdir())
    assert len(files) == 4
    generator = random.Random(0)
    for trial in range(120):
        path = files[trial % len(files)]
        original = path.read_bytes()
        place = generator.randrange(len(original))
        path.write_bytes(original[:place] + bytes([original[place] ^ (1 << generator.randrange(8))]) + original[place + 1 :])
        with pytest.raises(ArtifactCorruptError):
            verify(tmp_path / step_name(2), "train_state")
        path.write_bytes(original)
    with files[1].open("r+b") as stream:
        stream.truncate(files[1].stat().st_size - 1)
    assert latest_valid(FolderShelf(tmp_path)) == 1
    assert published_steps(FolderShelf(tmp_path)) == [1]
    save(tmp_path, 2, state)
    assert latest_valid(FolderShelf(tmp_path)) == 2


def test_half_written_checkpoints_are_never_found(tmp_path: Path) -> None:
    """[F1] A staging folder and a folder without a manifest are not checkpoints."""
    state, *_ = small_run()
    store = CheckpointStore(FolderShelf(tmp_path), keep=Retention(2), rank=0, num_ranks=2)
    store.save_async(1, state, FACTS)
    store.wait_for_part()
    assert latest_valid(FolderShelf(tmp_path)) is None
    (tmp_path / "step-00000009").mkdir()
    assert latest_valid(FolderShelf(tmp_path)) is None
    store.close()


def test_a_full_disk_is_a_clear_error_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    """[F2] The system refuses to let a file grow past a limit, at many limits: so it fails at every stage of writing."""
    state, *_ = small_run()
    save(tmp_path, 1, state)
    size_bytes = max(path.stat().st_size for path in (tmp_path / step_name(1)).iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, size_bytes, size_bytes // 12):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(InfraError, match=r"can't write the checkpoint of step 2.*Free disk space"):
                save(tmp_path, 2, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        assert latest_valid(FolderShelf(tmp_path)) == 1
    save(tmp_path, 2, state)
    assert latest_valid(FolderShelf(tmp_path)) == 2


def test_saving_does_not_wait_and_sees_one_moment(tmp_path: Path) -> None:
    """What is saved is the state at the call, though training goes on while it is written."""
    state, module, optimizer, counters = small_run()
    advance(module, optimizer, counters)
    expected = {name: piece.local.clone() for name, piece in state.pieces().items()}
    store = CheckpointStore(FolderShelf(tmp_path), keep=Retention(1), rank=0, num_ranks=1)
    store.save_async(1, state, FACTS)
    for _ in range(5):
        advance(module, optimizer, counters)
    store.wait_for_part()
    store.all_parts_written()
    store.wait_until_published()
    store.close()
    load(tmp_path, state)
    assert counters == {"tokens": 4}
    for name, piece in state.pieces().items():
        assert torch.equal(piece.local, expected[name]), name


def test_parts_hold_no_pickle(tmp_path: Path) -> None:
    state, *_ = small_run()
    save(tmp_path, 1, state)
    for path in (tmp_path / step_name(1)).iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            assert path.suffix == ".safetensors"


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_part_that_could_not_be_flushed_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """[F2] The first flush of a file fails: that rank's part counts as failed, before anybody would publish it."""
    state, *_ = small_run()
    save(tmp_path, 1, state)
    flush, failed = os.fsync, []

    def failing(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(suffix) and not failed:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    store = CheckpointStore(FolderShelf(tmp_path), keep=Retention(2), rank=0, num_ranks=1)
    store.save_async(2, state, FACTS)
    with pytest.raises(InfraError, match=r"can't write the checkpoint of step 2: \[Errno 5\]"):
        store.wait_for_part()
    store.close()
    assert failed and [path.name for path in tmp_path.iterdir()] == ["step-00000001"]

"""Laws of supervised fine-tuning as a whole, on a tiny model: exact, resumable, refusing what it can't do right."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib.cluster.local import LocalGroup
from lib.core.artifact import read_manifest, stage_artifact, verify
from lib.core.errors import ConfigError, ModelError, NonFiniteLossError, RunInUseError, WorkerDiedError
from lib.core.manifest import Manifest
from lib.recipes.sft import run_identity
from lib.train.lock import run_lock
from tests.lib.recipes.conftest import IN_PROCESS, NUM_ROWS, Inputs, Shown, fill, job, metrics, train


@pytest.fixture(scope="session")
def uninterrupted(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    root = tmp_path_factory.mktemp("uninterrupted")
    return root, train(inputs, job(), root)


def test_a_run_learns_and_leaves_all_that_is_promised(uninterrupted: tuple[Path, Manifest], inputs: Inputs) -> None:
    root, manifest = uninterrupted
    folder = root / "checkpoint"
    verify(folder, "checkpoint")
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    report = json.loads((folder / "train_report.json").read_text())
    assert report["curves"]["loss"] == [row["loss"] for row in rows]
    assert 0.5 < report["packing"]["efficiency"] <= 1.0 and report["packing"]["rows"] == 24
    assert "trained" in report["mask_preview_html"][0]
    assert (folder / "hf" / "tokenizer.json").read_bytes() == (inputs.model / "tokenizer.json").read_bytes()
    before, after = (load_file(path / "model.safetensors") for path in (inputs.model, folder / "hf"))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype == torch.bfloat16 for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert manifest.lineage["model"] == read_manifest(inputs.model).digest
    assert manifest.counts["steps"] == 6 and manifest.meta["step"] == 6
    assert manifest.info["train_seconds"] > 0 and manifest.info["mlflow_run_id"] is None


def test_the_same_run_twice_has_the_same_digest(uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path) -> None:
    """Same inputs, same bits; clocks and places are not in the digest."""
    assert train(inputs, job(), tmp_path).digest == uninterrupted[1].digest


@pytest.mark.parametrize("stops", [(1,), (2, 4), (3, 5)])
def test_a_driver_stopped_anywhere_and_called_again_ends_in_the_same_bits(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """[F3] [F5] [F6] Weights, moments, data position, metrics of every step and the sequence of samples: one digest."""
    for stop in stops:

        def interrupt(count: int, stop: int = stop) -> None:
            if count == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), stage_artifact(tmp_path / "stopped", "checkpoint") as staged:
            fill(inputs, job(), staged, run_dir=tmp_path / "run", shown=Shown(act=interrupt), factory=LocalGroup)
    assert train(inputs, job(), tmp_path).digest == uninterrupted[1].digest


def test_epochs_change_the_order_and_use_every_row_once(inputs: Inputs, tmp_path: Path) -> None:
    """[F4] Over many epochs each row is used as often as every other, give or take what waits in open packs."""
    train(inputs, job(steps=24, optim={"warmup_steps": 0}), tmp_path)
    used = [sample for row in metrics(tmp_path / "checkpoint") for sample in row["sample_ids"]]
    counts = {f"row-{number}": used.count(f"row-{number}") for number in range(NUM_ROWS)}
    assert set(used) == counts.keys() and max(counts.values()) - min(counts.values()) <= 2


def test_two_ranks_train_what_one_trains_and_a_killed_one_changes_nothing(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path
) -> None:
    """[C2] [F1] Two ranks: the same samples in every step, losses to 1e-5. Rank 1 killed by SIGKILL in step 4: the same bits.

    And 1 rank goes on from the 2 ranks' checkpoint with the same samples.
    """
    whole = train(inputs, job(ranks=2), tmp_path, run="whole", name="whole")
    one, two = metrics(uninterrupted[0] / "checkpoint"), metrics(tmp_path / "whole")
    for single, double in zip(one, two, strict=True):
        assert sorted(single["sample_ids"]) == sorted(double["sample_ids"])
        assert double["loss"] == pytest.approx(single["loss"], abs=1e-5)
        assert double["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4)
        assert double["learning_rate"] == single["learning_rate"]
    killer = _Killer(at_step=3)
    killed = train(inputs, job(ranks=2), tmp_path, run="killed", name="killed", shown=Shown(act=killer), group_factory=killer.factory)
    assert killer.kills == 1 and killed.info["restarts"] == 1
    assert killed.digest == whole.digest

    stop = Shown(act=lambda count: (_ for _ in ()).throw(KeyboardInterrupt) if count == 5 else None)
    with pytest.raises(KeyboardInterrupt), stage_artifact(tmp_path / "stopped", "checkpoint") as staged:
        fill(inputs, job(ranks=2), staged, run_dir=tmp_path / "resized", shown=stop, factory=LocalGroup)
    train(inputs, job(ranks=1), tmp_path, run="resized", name="resized")
    for single, resized in zip(one, metrics(tmp_path / "resized"), strict=True):
        assert sorted(single["sample_ids"]) == sorted(resized["sample_ids"])
        assert resized["loss"] == pytest.approx(single["loss"], abs=1e-5)


class _Killer:
    """Sends SIGKILL to the last rank when a step is reported for the first time."""

    def __init__(self, at_step: int) -> None:
        self.at_step, self.kills = at_step, 0
        self.group: LocalGroup | None = None

    def factory(self, *args: object, **kwargs: object) -> LocalGroup:
        self.group = LocalGroup(*args, **kwargs)  # type: ignore[arg-type]
        return self.group

    def __call__(self, count: int) -> None:
        if count >= self.at_step and not self.kills:
            assert self.group is not None
            self.kills += 1
            pid = self.group._watch._identity[1]["pid"]
            os.kill(pid, signal.SIGKILL)


def test_a_worker_that_dies_too_often_ends_the_run(inputs: Inputs, tmp_path: Path) -> None:
    killer = _Killer(at_step=1)
    settings = job(ranks=2, train={"max_restarts": 0})
    with pytest.raises(WorkerDiedError, match="rank 1"):
        train(inputs, settings, tmp_path, shown=Shown(act=killer), group_factory=killer.factory)


def test_a_loss_that_is_not_finite_stops_before_anything_is_updated(inputs: Inputs, tmp_path: Path) -> None:
    """[C5] Learning rate 1 on a peaked loss overflows: the error names step and samples, checkpoints stay as they were."""
    settings = job(steps=40, optim={"warmup_steps": 0, "max_grad_norm": 1e30}, train={"checkpoint_every": 1}).model_copy(
        update={"learning_rate": 1.0}
    )
    broken = inputs.model / "model.safetensors"
    weights = load_file(broken)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    poisoned = _poisoned(inputs, tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"step 1: .*row-\d+"):
        train(poisoned, settings, tmp_path)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def _poisoned(inputs: Inputs, root: Path) -> Inputs:
    """The model with one infinite weight, admitted as an artifact of its own."""
    from safetensors.torch import save_file

    from lib.core.artifact import link_or_copy

    with stage_artifact(root / "poisoned", "model") as staged:
        for path in inputs.model.iterdir():
            if path.name not in {"manifest.json", "model.safetensors"}:
                link_or_copy(path, staged.path / path.name)
        weights = load_file(inputs.model / "model.safetensors")
        weights["model.norm.weight"][3] = float("inf")
        save_file(weights, staged.path / "model.safetensors", metadata={"format": "pt"})
    report = inputs.report.model_copy(update={"model_digest": read_manifest(root / "poisoned").digest})
    return Inputs(root / "poisoned", inputs.data, report)


def test_a_second_run_in_the_same_folder_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"), pytest.raises(RunInUseError, match="another process is training"):
        train(inputs, job(), tmp_path)


def test_a_folder_of_another_job_is_refused(uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoints of another job"):
        train(inputs, job(steps=7), uninterrupted[0], name="other")


def test_training_needs_the_models_own_report_passed(inputs: Inputs, tmp_path: Path) -> None:
    for change, words in (({"model_digest": "0" * 64}, "is of model 0000"), ({"passed": False}, "has not passed")):
        wrong = Inputs(inputs.model, inputs.data, inputs.report.model_copy(update=change))
        with pytest.raises(ModelError, match=words):
            train(wrong, job(), tmp_path)


def test_identity_is_what_decides_the_numbers() -> None:
    """Ranks, deadlines and tracking may change when a run goes on; the learning rate or the seed may not."""
    identity = partial(run_identity, model_digest="m", data_digest="d")
    same = [job(), job(ranks=2), job(mlflow=True), job(train={"max_restarts": 0, "checkpoint_every": 5})]
    assert len({identity(one) for one in same}) == 1
    others = [job(steps=7), job(train={"seed": 1}), job(data={"seed": 1}), job(sequence_length=64)]
    assert len({identity(one) for one in [*others, job()]}) == 5


def test_micro_batches_of_any_size_train_the_same(uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path) -> None:
    """[C1] 4 rows as 4 x 1 (the default here), or 2 x 2: losses to 1e-6, on data whose rows have different numbers of targets."""
    train(inputs, job(train={"rows_per_micro_batch": 2}), tmp_path, group_factory=IN_PROCESS)
    for one, two in zip(metrics(uninterrupted[0] / "checkpoint"), metrics(tmp_path / "checkpoint"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)

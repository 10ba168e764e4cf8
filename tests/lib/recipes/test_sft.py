"""Laws of supervised fine-tuning as a whole, on a tiny model: exact, resumable, refusing what it can't do right."""

import json
import os
import resource
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.core.artifact import link_or_copy, read_manifest, stage_artifact, verify
from lib.core.errors import ConfigError, DataError, InfraError, ModelError, NonFiniteLossError, RunInUseError
from lib.core.examples import Conversation
from lib.core.manifest import Manifest
from lib.data.examples import open_examples
from lib.data.tokenize import tokenize_conversations
from lib.train.lock import run_lock
from lib.train.meters import read_rows
from lib.train.run import run_identity
from tests.lib.recipes.conftest import Inputs, Shown, job, metrics, train
from tests.lib.recipes.signalled import KilledWorker, group_of


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
    timings = [json.loads(line) for line in (root / "run" / "timings.jsonl").read_text().splitlines()]
    for row in timings:
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"])
        assert all(row["parts"][name] > 0 for name in ("forward", "backward", "optimizer"))
    assert manifest.info["part_seconds"]["save"] > 0 and len(manifest.info["peak_memory_bytes"]) == 1


def test_the_same_run_twice_has_the_same_digest(uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path) -> None:
    """Same inputs, same bits; clocks and places are not in the digest."""
    assert train(inputs, job(), tmp_path).digest == uninterrupted[1].digest


def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_from_its_last_checkpoint(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path
) -> None:
    """[F2] [F3] [F5] [F6] Files can't grow past 100 kB: in a new run, and in one that has a checkpoint of step 4.

    Called again with room, the run ends in the same bits: weights, moments, data position and the metrics of every step.
    """
    shutil.copytree(uninterrupted[0] / "run", tmp_path / "begun")
    shutil.rmtree(tmp_path / "begun" / "checkpoints" / "step-00000006")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for run, kept in (("new", []), ("begun", ["step-00000004"])):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(InfraError, match="Free disk space"):
                train(inputs, job(), tmp_path, run=run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in (tmp_path / run / "checkpoints").glob("*step-*")] == kept
        assert train(inputs, job(), tmp_path, run=run, name=f"from-{run}").digest == uninterrupted[1].digest


def test_a_damaged_newest_checkpoint_is_passed_over(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path
) -> None:
    """[F12] One bit flipped in the last of two checkpoints: the run goes on from the one before and ends in the same bits."""
    root = tmp_path / "run"
    shutil.copytree(uninterrupted[0] / "run", root)
    path = root / "checkpoints" / "step-00000006" / "state-00000-of-00001.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    shown = Shown()
    assert train(inputs, job(), tmp_path, shown=shown).digest == uninterrupted[1].digest
    assert [count for count, figures in shown.calls if "loss" in figures] == [5, 6]


@pytest.mark.timeout(600)
def test_two_ranks_train_what_one_trains_and_a_killed_one_changes_nothing(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path
) -> None:
    """[C2] [C3] [F1] Two ranks that sum up their gradients in each of two micro-batches: the same samples in every step, losses
    to 1e-5. Rank 1 killed with SIGKILL while it saves: the same bits.

    And one rank goes on from the two ranks' checkpoint of step 4, with the same samples and losses.
    """
    summed = {"reduce_gradients": "each_micro_batch"}
    two = job(ranks=2, train=summed)
    whole = train(inputs, two, tmp_path, run="run-whole", name="whole")
    one = metrics(uninterrupted[0] / "checkpoint")
    _same(one, metrics(tmp_path / "whole"))
    killed = train(inputs, two, tmp_path, run="run-killed", name="killed", group_factory=group_of(KilledWorker))
    assert killed.info["restarts"] == 1
    assert killed.digest == whole.digest
    shutil.rmtree(tmp_path / "run-whole" / "checkpoints" / "step-00000006")
    train(inputs, job(train=summed), tmp_path, run="run-whole", name="from-two-ranks")
    _same(one, metrics(tmp_path / "from-two-ranks"))


def _same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for row, same in zip(one, other, strict=True):
        assert row["samples"] == same["samples"]
        assert same["loss"] == pytest.approx(row["loss"], abs=1e-5)
        assert same["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
        assert same["learning_rate"] == row["learning_rate"]


def test_a_loss_that_is_not_finite_stops_before_anything_is_updated(inputs: Inputs, tmp_path: Path) -> None:
    """[C5, C10] A model with one infinite weight: the error names step and samples, no checkpoint of it is made, and none of
    its figures gets among those of other steps."""
    with stage_artifact(tmp_path / "poisoned", "model") as staged:
        for path in inputs.model.iterdir():
            if path.name not in {"manifest.json", "model.safetensors"}:
                link_or_copy(path, staged.path / path.name)
        weights = load_file(inputs.model / "model.safetensors")
        weights["model.norm.weight"][3] = float("inf")
        save_file(weights, staged.path / "model.safetensors", metadata={"format": "pt"})
    report = inputs.report.model_copy(update={"model_digest": read_manifest(tmp_path / "poisoned").digest})
    with pytest.raises(NonFiniteLossError, match=r"step 1: loss nan.*Nothing was updated.*row-\d+"):
        train(Inputs(tmp_path / "poisoned", inputs.data, report), job(), tmp_path)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert not read_rows(tmp_path / "run" / "metrics.jsonl")


def test_a_second_run_in_the_same_folder_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"), pytest.raises(RunInUseError, match="another process is training"):
        train(inputs, job(), tmp_path)


def test_a_folder_of_another_job_is_refused(uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoints of another job"):
        train(inputs, job(steps=7), uninterrupted[0], name="other")


def test_a_trace_changes_no_bit(uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path) -> None:
    """Weights, moments and the metrics of every step are those of a run without; the run is the same run."""
    watched = job(train={"profile": {"first_step": 3, "num_steps": 2}})
    found = train(inputs, watched, tmp_path)
    assert [path.name for path in (tmp_path / "run" / "profiles").iterdir()] == ["rank-00000-steps-3-to-4.json.gz"]
    assert found.meta == uninterrupted[1].meta
    state = "state/state-00000-of-00001.safetensors"
    for name in ("metrics.jsonl", state):
        assert (tmp_path / "checkpoint" / name).read_bytes() == (uninterrupted[0] / "checkpoint" / name).read_bytes(), name
    with pytest.raises(ConfigError, match="ends with step 7, after the last of 6"):
        job(train={"profile": {"first_step": 7}})


def test_nothing_of_a_run_before_is_taken_from_a_dirty_folder(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path
) -> None:
    """[J3] Metrics, an export and half-written checkpoints of another run, whose own checkpoints are gone: the run begins at
    step 1 and ends in the bits of a clean one, metrics and samples too.
    """
    train(inputs, job(steps=7, data={"seed": 5}), tmp_path, name="old")
    checkpoints = tmp_path / "run" / "checkpoints"
    os.rename(checkpoints / "step-00000006", checkpoints / ".staging-step-00000006-0")
    shutil.rmtree(checkpoints / "step-00000007")
    (tmp_path / "run" / "export" / "hf" / "stale.safetensors").write_bytes(b"old")
    assert train(inputs, job(), tmp_path).digest == uninterrupted[1].digest


def test_training_needs_the_models_own_report_passed(inputs: Inputs, tmp_path: Path) -> None:
    for change, words in (({"model_digest": "0" * 64}, "is of model 0000"), ({"passed": False}, "has not passed")):
        wrong = Inputs(inputs.model, inputs.data, inputs.report.model_copy(update=change))
        with pytest.raises(ModelError, match=words):
            train(wrong, job(), tmp_path)


def test_identity_is_what_decides_the_numbers() -> None:
    """Ranks, deadlines and tracking may change when a run goes on; the learning rate, the seed or an input may not."""
    identity = partial(run_identity, "sft", model_digest="m", data_digest="d")
    same = [job(), job(ranks=2), job(mlflow=True), job(train={"max_restarts": 0, "checkpoint_every": 5, "profile": {}})]
    assert len({identity(one) for one in same}) == 1
    others = [job(steps=7), job(train={"seed": 1}), job(data={"seed": 1}), job(sequence_length=64)]
    others += [job(train={"reduce_gradients": "each_micro_batch"})]
    assert len({identity(one) for one in [*others, job()]}) == 6
    # So do the model, the data, and the checkpoint that a run goes on from.
    inputs = [{}, {"model_digest": "n"}, {"data_digest": "e"}, {"from_digest": "c"}, {"from_digest": "other"}]
    assert len({identity(job(), **changed) for changed in inputs}) == 5


def test_micro_batches_of_any_size_train_the_same(uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path) -> None:
    """[C1] 4 rows as 4 x 1 (the default here), or 2 x 2: losses to 1e-6 though rows differ in targets."""
    train(inputs, job(train={"rows_per_micro_batch": 2}), tmp_path)
    for one, two in zip(metrics(uninterrupted[0] / "checkpoint"), metrics(tmp_path / "checkpoint"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)


def test_background_workers_change_no_step(uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path) -> None:
    """A data process, and two threads: the metrics of every step, samples too, are those of one thread."""
    for name, change in {"process": {"worker_kind": "process"}, "threads": {"workers": 2}}.items():
        train(inputs, job(data=change), tmp_path, run=f"run-{name}", name=name)
        assert metrics(tmp_path / name) == metrics(uninterrupted[0] / "checkpoint")


def test_tokenised_rows_train_the_same(uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path) -> None:
    """The metrics of every step and the page's previews are those of rows that are tokenised on the way."""
    with stage_artifact(tmp_path / "tokens", "tokenized_dataset") as staged:
        tokenize_conversations(inputs.data, inputs.model, job().config.data.chat, staged, lambda _: None)
    train(replace(inputs, data=tmp_path / "tokens"), job(), tmp_path)
    assert metrics(tmp_path / "checkpoint") == metrics(uninterrupted[0] / "checkpoint")
    shown = [json.loads((root / "checkpoint" / "train_report.json").read_text()) for root in (tmp_path, uninterrupted[0])]
    assert shown[0]["mask_preview_html"] == shown[1]["mask_preview_html"]


def test_a_mixture_is_trained_and_its_shares_are_reported(inputs: Inputs, tmp_path: Path) -> None:
    """The run's own data set and the files it was made from, 1 : 3; what the second lacks is found before training."""
    rows = tmp_path / "rows.jsonl"
    shutil.copyfile(inputs.data.parent / "rows.jsonl", rows)
    digest = open_examples(rows, Conversation, kind="conversation").digest
    files = {"name": "files", "weight": 3.0, "location": str(rows), "digest": digest}
    mixture = [{"name": "own"}, files]
    train(inputs, job(data={"mixture": mixture}), tmp_path)
    packing = json.loads((tmp_path / "checkpoint" / "train_report.json").read_text())["packing"]
    shares = {name: source["share_of_documents"] for name, source in packing["sources"].items()}
    assert sum(shares.values()) == pytest.approx(1.0) and 0.5 < shares["files"] < 0.95
    with pytest.raises(DataError, match=rf"source 'files' .* has no digest; set digest: {digest}"):
        train(inputs, job(data={"mixture": [{"name": "own"}, {**files, "digest": ""}]}), tmp_path, run="other", name="other")
    rows.write_bytes(rows.read_bytes().replace(b"sum", b"SUM", 1))  # of the same size
    with pytest.raises(DataError, match=r"source 'files' .* holds other rows than its digest says"):
        train(inputs, job(data={"mixture": mixture}), tmp_path, run="other", name="other")
    gone = [{"name": "own"}, {"name": "files", "location": str(tmp_path / "gone.jsonl")}]
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        train(inputs, job(data={"mixture": gone}), tmp_path, run="other", name="other")

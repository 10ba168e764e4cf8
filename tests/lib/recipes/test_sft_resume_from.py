"""Laws of going on from a finished run's checkpoint: as if it had never ended, and only where that is so."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lib.config.recipes import SftJob
from lib.core.artifact import link_or_copy, read_manifest, stage_artifact
from lib.core.errors import ConfigError, ModelError, UserError
from lib.core.manifest import Manifest
from tests.lib.recipes.conftest import Inputs, job, metrics, train

FLAT = {"warmup_steps": 0, "final_fraction": 1.0}
"""A learning rate that doesn't depend on where a run ends."""


def flat_job(steps: int, **changes: object) -> SftJob:
    return job(steps=steps, optim=FLAT, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def short(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    root = tmp_path_factory.mktemp("short")
    return root / "checkpoint", train(inputs, flat_job(3), root)


def test_a_run_that_goes_on_is_the_run_that_never_ended(short: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path) -> None:
    """[F5] 3 steps, and 3 more from their checkpoint in a new run: weights and the metrics of all steps are those of 6 steps.

    Called again after a kill, it goes on from its own checkpoint.
    """
    whole = train(inputs, flat_job(6), tmp_path, run="run-whole", name="whole")
    onward = replace(inputs, resume_from=short[0])
    first = train(onward, flat_job(6), tmp_path)
    assert first.meta["weights_digest"] == whole.meta["weights_digest"]
    assert metrics(tmp_path / "checkpoint") == metrics(tmp_path / "whole")
    assert first.lineage["resume_from"] == short[1].digest and "resume_from" not in whole.lineage
    assert json.loads((tmp_path / "checkpoint" / "state" / "train_state.json").read_text())["step"] == 6
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert train(onward, flat_job(6), tmp_path, name="again").digest == first.digest


def test_what_does_not_fit_is_refused(short: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path) -> None:
    """The message says what, and nothing has been trained."""
    onward = replace(inputs, resume_from=short[0])
    with pytest.raises(ConfigError, match="has 3 steps behind it and the run ends after 3; raise steps"):
        train(onward, flat_job(3), tmp_path, run="a")
    lora = flat_job(6, model={"lora": {"rank": 4}})
    with pytest.raises(ModelError, match=r"the run needs model/weight/.*lora.* the checkpoint holds none"):
        train(onward, lora, tmp_path, run="b")
    with pytest.raises(ConfigError, match="the saved data position is of another run"):
        train(onward, flat_job(6, data={"seed": 9}), tmp_path, run="c")
    with pytest.raises(UserError, match="expected a 'checkpoint'"):
        train(replace(inputs, resume_from=inputs.model), flat_job(6), tmp_path, run="d")
    with stage_artifact(tmp_path / "other", "model") as staged:
        for path in inputs.model.iterdir():
            if path.name not in {"manifest.json", "model.safetensors"}:
                link_or_copy(path, staged.path / path.name)
        weights = load_file(inputs.model / "model.safetensors")
        weights["model.norm.weight"][0] += 1
        save_file(weights, staged.path / "model.safetensors", metadata={"format": "pt"})
    report = inputs.report.model_copy(update={"model_digest": read_manifest(tmp_path / "other").digest})
    other = replace(onward, model=tmp_path / "other", report=report)
    with pytest.raises(ModelError, match="resume_from was trained from model"):
        train(other, flat_job(6), tmp_path, run="e")
    assert not list(tmp_path.glob("*/metrics.jsonl.new")) and not (tmp_path / "checkpoint").exists()


def test_a_checkpoint_of_more_weights_than_the_run_trains_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    """Adapters of fewer projections, the others' must not be lost."""
    lora = {"rank": 4, "targets": ["q", "v"]}
    train(inputs, flat_job(2, model={"lora": lora}), tmp_path, name="two")
    onward = replace(inputs, resume_from=tmp_path / "two")
    with pytest.raises(ModelError, match=r"trains model/weight/.*attn\.v.* which the run doesn't"):
        train(onward, flat_job(4, model={"lora": {**lora, "targets": ["q"]}}), tmp_path, run="less")

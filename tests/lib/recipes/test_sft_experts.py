"""Fine-tuning with experts dealt out over ranks as a whole: the run of one process, and a folder that opens like any other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lib.core.artifact import read_manifest, stage_artifact
from lib.core.errors import ConfigError
from lib.models.admit import admit_model
from lib.models.verify import build_logit_report
from tests.lib.models.checkpoints import family_model
from tests.lib.recipes.conftest import Inputs, job, metrics, train

DEALT = {"ranks": 2, "parallel": {"expert": 2}}


@pytest.fixture(scope="module")
def given(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("experts")
    with stage_artifact(root / "model", "model") as staged:
        admit_model(family_model(root / "source", "qwen3_moe", num_experts=4, dtype="float32"), staged)
    report = build_logit_report(root / "model", num_configs=1)
    digest = read_manifest(root / "model").digest
    return Inputs(root / "model", inputs.data, report.model_copy(update={"model_digest": digest}))


@pytest.mark.timeout(600)
def test_two_ranks_with_half_of_the_experts_each_are_one(given: Inputs, tmp_path: Path) -> None:
    """The same samples, losses and weights that come out, in a folder that transformers opens. [F9] One rank goes on from the
    second step of the two: the same losses again."""
    alone, dealt = job(steps=4), job(steps=4, **DEALT)  # type: ignore[arg-type]
    train(given, alone, tmp_path, run="alone", name="of one")
    train(given, dealt, tmp_path, run="dealt", name="of two")
    shutil.rmtree(tmp_path / "dealt" / "checkpoints" / "step-00000004")
    train(given, alone, tmp_path, run="dealt", name="gone on")
    expected = metrics(tmp_path / "of one")
    for name in ("of two", "gone on"):
        for ours, theirs in zip(metrics(tmp_path / name), expected, strict=True):
            assert ours["samples"] == theirs["samples"]
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        found, whole = (load_file(tmp_path / folder / "hf" / "model.safetensors") for folder in (name, "of one"))
        for tensor, values in whole.items():
            assert (found[tensor] - values).abs().max() <= 1e-3 * values.abs().max(), tensor
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "of two" / "hf", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values())
    layout = json.loads((tmp_path / "of two" / "state" / "train_state.json").read_text())["layout"]
    assert layout["expert"] == 2


def test_a_model_without_experts_is_refused_before_anything_starts(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.parallel\.expert is 2, but the model is a llama model without experts"):
        train(inputs, job(**DEALT), tmp_path)  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "checkpoints").exists()

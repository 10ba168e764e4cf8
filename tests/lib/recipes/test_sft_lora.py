"""Laws of fine-tuning with adapters as a whole: only they change, only they are saved, and they come out in both forms."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lib.config.recipes import SftJob
from lib.core.artifact import read_manifest, verify
from lib.core.errors import ConfigError
from lib.core.manifest import Manifest
from lib.models.hf_io import read_spec
from lib.models.lora import trained_shapes
from tests.lib.recipes.conftest import Inputs, job, metrics, train

LORA: dict[str, Any] = {"rank": 4, "alpha": 16.0, "dropout": 0.1, "targets": ["q", "v", "down"], "train_fully": ["norms"]}
ADAPTED = ("q_proj", "v_proj", "down_proj", "norm")


def lora_job(**changes: Any) -> Any:
    return job(model={"lora": LORA | changes})


@pytest.fixture(scope="module")
def uninterrupted(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    root = tmp_path_factory.mktemp("lora")
    return root, train(inputs, lora_job(), root)


def test_only_what_is_named_is_trained(uninterrupted: tuple[Path, Manifest], inputs: Inputs) -> None:
    """[D4] It learns; every other weight that comes out has the bits that went in."""
    root, manifest = uninterrupted
    rows = metrics(root / "checkpoint")
    assert rows[-1]["loss"] < rows[0]["loss"]
    before, after = (load_file(path / "model.safetensors") for path in (inputs.model, root / "checkpoint" / "hf"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        changed = not torch.equal(tensor, after[name])
        assert changed == any(part in name for part in ADAPTED), name
    spec, lora = read_spec(inputs.model)[1], lora_job().config.model.lora
    shapes = trained_shapes(spec, lora)
    assert manifest.counts["trained_parameters"] == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert manifest.meta["adapter"] == "peft"


def test_a_checkpoint_holds_what_is_trained_and_names_its_base(uninterrupted: tuple[Path, Manifest], inputs: Inputs) -> None:
    """Weights and two moments of each, nothing of the frozen ones."""
    state = uninterrupted[0] / "checkpoint" / "state"
    spec, lora = read_spec(inputs.model)[1], lora_job().config.model.lora
    with safe_open(state / "state-00000-of-00001.safetensors", framework="pt") as stream:
        names = set(stream.keys())
    shapes = trained_shapes(spec, lora)
    kinds = ("weight", "exp_avg", "exp_avg_sq", "step")
    assert names == {f"model/{kind}/decoder.{name}" for kind in kinds for name in shapes}
    assert json.loads((state / "train_state.json").read_text())["model"] == read_manifest(inputs.model).digest


def test_a_run_that_goes_on_from_a_checkpoint_ends_in_the_same_bits(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path
) -> None:
    """[F1] Adapters, moments and what dropout drops: the last checkpoint is taken away, and steps 5 and 6 run again."""
    shutil.copytree(uninterrupted[0] / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert train(inputs, lora_job(), tmp_path).digest == uninterrupted[1].digest


def test_recomputing_layers_changes_no_bit_though_dropout_draws_again(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path
) -> None:
    train(inputs, job(model={"lora": LORA, "activation_checkpointing": "layer"}), tmp_path)
    assert metrics(tmp_path / "checkpoint") == metrics(uninterrupted[0] / "checkpoint")


def test_a_compiled_run_goes_on_in_the_same_bits(uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path) -> None:
    """[F1] Ranks that start anew make the same code; dropout draws what it draws without. Losses are those of plain layers."""
    compiled = job(model={"lora": LORA, "compile": "layer"})
    digest = train(inputs, compiled, tmp_path).digest
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    shutil.rmtree(tmp_path / "checkpoint")
    assert train(inputs, compiled, tmp_path).digest == digest
    pairs = list(zip(metrics(tmp_path / "checkpoint"), metrics(uninterrupted[0] / "checkpoint"), strict=True))
    assert all(found["loss"] == pytest.approx(expected["loss"], rel=1e-5) for found, expected in pairs)


def test_the_adapter_is_the_merged_model(uninterrupted: tuple[Path, Manifest], inputs: Inputs) -> None:
    """In transformers and peft, on the base that was trained; the merged weights were rounded once, to bfloat16."""
    folder = uninterrupted[0] / "checkpoint"
    verify(folder, "checkpoint")
    token_ids = torch.arange(3, 35)[None]
    merged, base = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (folder / "hf", inputs.model)
    )
    with torch.no_grad():
        plain = base(token_ids).logits
        adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()(token_ids).logits
        rounded = (adapted - merged(token_ids).logits).abs().max()
    assert rounded <= 0.02 * float(adapted.abs().max()) and rounded < 0.5 * (adapted - plain).abs().max()


def test_a_target_that_the_model_lacks_is_refused_before_anything_starts(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this llama model has no 'experts'"):
        train(inputs, lora_job(targets=["experts"]), tmp_path)
    assert not (tmp_path / "run").exists()


def test_adapters_of_experts_on_gpus_need_a_rank_that_a_grouped_product_takes() -> None:
    values = job(model={"lora": LORA | {"targets": ["experts"]}}, train={"rows_per_step": 8}, data={"num_streams": 8})
    with pytest.raises(ConfigError, match=r"lora.rank \(4\) is not a multiple of 8"):
        SftJob.parse(values.model_dump() | {"gpus_per_node": 8}, where="test")


def test_without_lora_there_is_no_adapter(inputs: Inputs, tmp_path: Path) -> None:
    manifest = train(inputs, job(steps=3), tmp_path)
    assert manifest.meta["adapter"] == "none" and not (tmp_path / "checkpoint" / "adapter").exists()

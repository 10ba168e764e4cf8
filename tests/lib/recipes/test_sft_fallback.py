"""A model without family goes through the same recipe and the same scoring, one document in a row."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lib.core.artifact import read_manifest, stage_artifact
from lib.core.errors import ConfigError, ModelError
from lib.core.examples import Conversation, Message
from lib.evals.loss import row_losses
from lib.models.admit import admit_model
from lib.models.hf_fallback import load_fallback
from lib.models.verify_fallback import verify_folder
from lib.tokens.chat import ChatEncoder
from lib.tokens.rules import ChatRules
from lib.tokens.tokenizer import Tokenizer
from tests.lib.models.test_hf_fallback import fallback_model
from tests.lib.recipes.conftest import Inputs, job, metrics, train

PAD: dict[str, Any] = {"packing": "pad"}


def prepare(inputs: Inputs, root: Path, kind: str) -> Inputs:
    with stage_artifact(root / kind, "model") as staged:
        admit_model(fallback_model(root / f"{kind}-source", kind), staged)
    report = verify_folder(root / kind).model_copy(update={"model_digest": read_manifest(root / kind).digest})
    return Inputs(root / kind, inputs.data, report)


@pytest.fixture(scope="module")
def trained(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Inputs, Path]:
    root = tmp_path_factory.mktemp("fallback")
    given = prepare(inputs, root, "starcoder2")
    train(given, job(data=PAD), root)
    return given, root


def test_it_learns_and_transformers_opens_what_comes_out(trained: tuple[Inputs, Path]) -> None:
    """[D2] Every tensor of the source under its name, shape and dtype; weights moved; the tokenizer is the source's."""
    given, root = trained
    rows, out = metrics(root / "checkpoint"), root / "checkpoint" / "hf"
    assert rows[-1]["loss"] < rows[0]["loss"]
    before, after = load_file(given.model / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in before.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in after.items()
    }
    assert any(not torch.equal(before[name], after[name]) for name in before)
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert Tokenizer.load(out).digest == Tokenizer.load(given.model).digest
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2


def test_the_same_run_twice_and_a_resumed_one_are_the_same_bits(trained: tuple[Inputs, Path], tmp_path: Path) -> None:
    """Resumed from step 4 of the first run's checkpoints."""
    given, root = trained
    assert train(given, job(data=PAD), tmp_path).digest == read_manifest(root / "checkpoint").digest
    for path in (tmp_path / "run" / "checkpoints").glob("step-00000006/*"):
        path.unlink()
    (tmp_path / "run" / "checkpoints" / "step-00000006").rmdir()
    assert train(given, job(data=PAD), tmp_path, name="resumed").digest == read_manifest(root / "checkpoint").digest


def test_two_ranks_train_what_one_trains(trained: tuple[Inputs, Path], tmp_path: Path) -> None:
    """[C2] Sharded over two ranks: losses to 1e-5."""
    given, root = trained
    train(given, job(ranks=2, data=PAD), tmp_path)
    for one, two in zip(metrics(root / "checkpoint"), metrics(tmp_path / "checkpoint"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)


def test_what_is_not_proven_is_refused_with_the_remedy(trained: tuple[Inputs, Path], inputs: Inputs, tmp_path: Path) -> None:
    """Packing of a model with windows; parts of adapters that only families have names for; adapters that a report has a
    problem with. A model whose documents are the same packed may be packed, and its first loss is that of rows of their own."""
    given, _ = trained
    with pytest.raises(ModelError, match=r"sliding_window.*set config\.data\.packing: pad"):
        train(given, job(), tmp_path)
    with pytest.raises(ConfigError, match=r"config\.model\.lora: targets"):
        train(given, job(data=PAD, model={"lora": {"rank": 4, "targets": ["q"]}}), tmp_path)
    doubted = replace(given, report=given.report.model_copy(update={"adapter_problem": "logits differ"}))
    with pytest.raises(ModelError, match=r"adapters are not proven .* \(logits differ\); leave config\.model\.lora out"):
        train(doubted, job(data=PAD, model={"lora": {"rank": 4}}), tmp_path)
    proven = prepare(inputs, tmp_path, "gpt2")
    assert not proven.report.packing_problem
    with pytest.raises(ConfigError, match=r"no module of this model is named layers\.<number>"):
        train(proven, job(steps=3, model={"activation_checkpointing": "layer"}), tmp_path)
    train(proven, job(steps=3), tmp_path, run="run-packed", name="packed")
    assert metrics(tmp_path / "packed")[-1]["loss"] < metrics(tmp_path / "packed")[0]["loss"]


def test_adapters_are_trained_resumed_merged_and_read_by_peft(inputs: Inputs, tmp_path: Path) -> None:
    """[D1] [D4] GPT-2, whose weights lie the other way round and whose head is tied, with dropout: only adapters' numbers are
    trained and saved; resumed from step 4 the same bits; what is merged differs in adapted weights alone, and its logits are
    those of the adapter in peft."""
    given, settings = prepare(inputs, tmp_path, "gpt2"), job(data=PAD, model={"lora": {"rank": 4, "dropout": 0.1}})
    whole = train(given, settings, tmp_path)
    assert whole.meta["adapter"] == "peft"
    assert whole.counts["trained_parameters"] == 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    rows, out = metrics(tmp_path / "checkpoint"), tmp_path / "checkpoint"
    assert rows[-1]["loss"] < rows[0]["loss"]
    for path in (tmp_path / "run" / "checkpoints").glob("step-00000006/*"):
        path.unlink()
    (tmp_path / "run" / "checkpoints" / "step-00000006").rmdir()
    assert train(given, settings, tmp_path, name="resumed").digest == whole.digest
    before, after = load_file(given.model / "model.safetensors"), load_file(out / "hf" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"transformer.h.{layer}.{kind}.weight" for layer in range(2) for kind in kinds}
    merged, base = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (out / "hf", given.model))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = merged(ids, use_cache=False).logits
        found = PeftModel.from_pretrained(base, out / "adapter").eval()(ids, use_cache=False).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_the_held_out_loss_is_that_of_transformers(trained: tuple[Inputs, Path]) -> None:
    """[B7] Row by row, against transformers' own loss of the labels."""
    given, _ = trained
    encoder = ChatEncoder(Tokenizer.load(given.model), ChatRules())
    asked = [(Message("user", f"{n}?"), Message("assistant", "The answer is " * n)) for n in (1, 4)]
    rows = encoder.encode([Conversation("a", messages, "f:1") for messages in asked])
    found = row_losses(load_fallback(given.model), rows, tokens_per_pack=1, pad_id=0)
    reference = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    for row, (loss, count) in zip(rows, found):
        ids, kept = torch.tensor([list(row.token_ids)]), torch.tensor([list(row.loss_mask)])
        expected = reference(ids, labels=torch.where(kept, ids, -100), use_cache=False).loss
        assert loss / count == pytest.approx(float(expected), rel=1e-5)

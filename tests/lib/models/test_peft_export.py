"""What is written for PEFT is, in transformers and peft, the model that was trained; and so are the merged weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lib.config.model import LoraConfig
from lib.models.decoder import Decoder
from lib.models.families import FAMILIES
from lib.models.hf_export import write_hf_folder
from lib.models.hf_io import CheckpointReader, read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.peft_export import why_not_peft, write_adapter
from lib.parallel.load import full_tensors, trained_tensors
from tests.lib.models.adapters import all_targets, with_adapters
from tests.lib.models.checkpoints import family_model
from tests.tiny import VOCAB_SIZE

SMALL: dict[str, Any] = {"hidden_size": 32, "head_dim": 16, "dtype": "float32"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{family: ({"family": family}, {}) for family in FAMILIES},
    "untied, rsLoRA": ({"family": "llama", "tie_word_embeddings": False, "attention_bias": True}, {"rslora": True}),
    "norms in full": ({"family": "qwen3"}, {"targets": ("q", "down"), "train_fully": ("norms",)}),
    "tied, embedding in full": ({"family": "llama"}, {"targets": ("v",), "train_fully": ("embed",)}),
    "untied, both in full": (
        {"family": "llama", "tie_word_embeddings": False},
        {"targets": ("v",), "train_fully": ("embed", "head")},
    ),
    "untied, embedding adapted": ({"family": "qwen2", "tie_word_embeddings": False}, {"targets": ("embed",)}),
    "rows without an id": ({"family": "llama", "vocab_size": 390}, {}),
    "rows without an id, untied": ({"family": "qwen3", "vocab_size": 390, "tie_word_embeddings": False}, {}),
    "tied, many layers": ({"family": "llama", "num_hidden_layers": 11}, {"targets": ("o",)}),
    "experts, rsLoRA": ({"family": "qwen3_moe", "tie_word_embeddings": False}, {"targets": ("experts",), "rslora": True}),
    "router in full": ({"family": "qwen3_moe"}, {"targets": ("q",), "train_fully": ("router",)}),
    "fused experts, router in full": ({"family": "gpt_oss"}, {"targets": ("experts",), "train_fully": ("router", "norms")}),
}
"""Case -> (fields of the model, of LoRA). Adapters are on everything that the model has where no targets are named."""


def trained(source: Path, case: str) -> tuple[Decoder, LoraConfig]:
    """A decoder with random adapters, and with other weights where they are trained themselves."""
    fields = {"rank": 3, "alpha": 4.0, **CASES[case][1]}
    decoder = with_adapters(source, **fields)
    targets = fields.get("targets") or tuple(
        target for target in all_targets(decoder.spec) if target not in fields.get("train_fully", ())
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.requires_grad and ".lora." not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return decoder, LoraConfig(**(fields | {"targets": targets}))


@torch.no_grad()
def ours(decoder: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
    layout = DocumentLayout.from_document_ids(torch.zeros_like(token_ids))
    return decoder.logits(decoder(token_ids, torch.arange(token_ids.shape[1]).expand_as(token_ids), layout))


def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_merged_weights_and_adapter_are_what_was_trained(case: str, tmp_path: Path) -> None:
    """[D1, D3, D4] Logits of ours, of transformers with the merged weights, and of transformers and peft with the adapter on
    the source: equal to 1e-5 of the greatest, tied and untied, and different from the source's."""
    source = family_model(tmp_path / "source", **(SMALL | CASES[case][0]))
    decoder, config = trained(source, case)
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    merged.mkdir()
    adapter.mkdir()
    write_hf_folder(merged, full_tensors(decoder), source)
    write_adapter(adapter, trained_tensors(decoder), config, decoder.spec)
    assert CheckpointReader(merged).names() == CheckpointReader(source).names()

    token_ids = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(2))
    expected = ours(decoder, token_ids)
    base = reference(source)
    limit = 1e-5 * float(expected.abs().max())
    assert (base(token_ids, use_cache=False).logits - expected).abs().max() > 100 * limit
    assert (reference(merged)(token_ids, use_cache=False).logits - expected).abs().max() <= limit
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    assert (loaded(token_ids, use_cache=False).logits - expected).abs().max() <= limit
    assert_every_tensor_was_taken(loaded, adapter)


def assert_every_tensor_was_taken(model: Any, adapter: Path) -> None:
    """peft reads what it knows and leaves the rest: its own numbers that aren't zero must be as many as the file's."""
    own = [tensor for name, tensor in model.named_parameters() if "lora_" in name or "modules_to_save" in name]
    stored = load_file(adapter / "adapter_model.safetensors").values()
    assert sum(int(tensor.count_nonzero()) for tensor in own) == sum(int(tensor.count_nonzero()) for tensor in stored)


def test_the_settings_say_what_was_trained(tmp_path: Path) -> None:
    source = family_model(tmp_path / "source", **(SMALL | CASES["untied, rsLoRA"][0]))
    decoder = with_adapters(source, rank=8, targets=("q", "down"))
    config = LoraConfig(rank=8, alpha=24.0, rslora=True, dropout=0.1, targets=("q", "down"))
    write_adapter(tmp_path, trained_tensors(decoder), config, decoder.spec)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"r": 8, "lora_alpha": 24.0, "use_rslora": True, "lora_dropout": 0.1, "bias": "none", "task_type": "CAUSAL_LM"}
    assert settings.items() >= expected.items()
    assert settings["target_modules"] == ["down_proj", "q_proj"] and settings["modules_to_save"] is None
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight" in stored and len(stored) == 8


def test_what_peft_cannot_hold_is_known_before(tmp_path: Path) -> None:
    """Adapters of the MLPs between layers with experts: peft takes their names for those of the experts."""
    spec = read_spec(family_model(tmp_path, "qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1]))[1]
    assert "MLPs of the layers without experts" in str(why_not_peft(LoraConfig(), spec))
    assert why_not_peft(LoraConfig(targets=("q", "experts")), spec) is None

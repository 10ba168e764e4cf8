"""A config.json is read in both of its spellings, and refused where it asks for anything that isn't computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lib.core.errors import ModelError
from lib.models.decoder import Decoder
from lib.models.families import FAMILIES, family_of
from lib.models.hf_io import read_spec
from lib.models.layers.rotary import rotary_frequencies
from lib.models.spec import DecoderSpec, Rope, RopeScaling
from tests.tiny import tiny_model

SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "rope_interleaved": False,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "is_llama_config": True,
    "transformers.js_config": {"kv_cache_dtype": {}},
}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def spec_of(**changes: Any) -> DecoderSpec:
    config = SMOLLM2 | changes
    return family_of(config).spec_from_config(config)


def test_the_numbers_of_a_real_config_are_read() -> None:
    """SmolLM2-135M has 134,515,008 parameters with its head tied."""
    spec = spec_of()
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert (spec.rope, spec.norm_eps, spec.tied) == (Rope(100000.0), 1e-5, True)
    assert spec.num_parameters == 134_515_008


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_the_parameter_count_is_that_of_the_module(tied: bool, biases: bool) -> None:
    spec = spec_of(tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases, num_hidden_layers=2)
    with torch.device("meta"):
        decoder = Decoder(spec)
    assert spec.num_parameters == sum(parameter.numel() for parameter in decoder.parameters())
    assert set(FAMILIES["llama"].weight_map(spec).entries) == {name for name, _ in decoder.named_parameters()}


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3_ROPE])
def test_both_spellings_of_rope_are_one(rope: dict[str, Any] | None) -> None:
    """[D8] `rope_theta` + `rope_scaling` of transformers 4 and `rope_parameters` of transformers 5."""
    old = spec_of(rope_scaling=rope)
    config = {key: value for key, value in SMOLLM2.items() if key != "rope_theta"}
    config["rope_parameters"] = {"rope_theta": 100000.0, **(rope or {"rope_type": "default"})}
    assert family_of(config).spec_from_config(config) == old
    if rope:
        legacy = {("type" if key == "rope_type" else key): value for key, value in rope.items()}
        assert spec_of(rope_scaling=legacy) == old


@pytest.mark.parametrize("original", [16, 512, 8192])
def test_stretched_frequencies_are_those_of_transformers(original: int) -> None:
    """Short, middle and long wavelengths each take their own branch of the llama3 formula."""
    rope = {**LLAMA3_ROPE, "rope_theta": 1e5, "original_max_position_embeddings": original}
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, num_hidden_layers=1, vocab_size=8, rope_parameters=dict(rope))
    theirs = LlamaForCausalLM(config).model.rotary_emb.inv_freq
    ours = rotary_frequencies(Rope(1e5, RopeScaling("llama3", 8.0, 1.0, 4.0, original)), 64, torch.device("cpu"))
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
            r"no trust_remote_code\. .*delete auto_map",
        ),
        ({"architectures": ["BloomForCausalLM"]}, "unknown; known"),
        ({"architectures": []}, "unknown; known"),
        ({"model_type": "gpt_oss"}, "unknown; known"),
        ({"model_type": "mamba"}, "unknown; known"),
        ({"model_type": ["llama"]}, "unknown; known"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"logit_scale": 0.5}, r"unknown key\(s\) \['logit_scale'\]"),
        ({"embedding_multiplier": 12}, "unknown key"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported; known: default, linear, llama3, yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 2}}, "attention_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "not below"),
        ({"rope_scaling": "linear"}, "expected a mapping"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, "contradicts"),
        ({"num_key_value_heads": 2}, "not a multiple"),
        ({"head_dim": 33}, "head_dim"),
        ({"hidden_size": "576"}, "hidden_size is '576'"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    """[D8, L3] Never ignored: architecture, remote code, and every key that would change the numbers."""
    with pytest.raises(ModelError, match=message):
        spec_of(**changes)


def test_a_folder_is_named_in_the_error(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "payload.Config"}}))
    (tmp_path / "payload.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match=str(tmp_path)):
        read_spec(tmp_path)
    assert not (tmp_path / "ran").exists()

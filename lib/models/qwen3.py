"""The Qwen3 family: as llama, with a norm on each query and key head, and windows in the upper layers where asked for."""

from collections.abc import Mapping
from typing import Any

from lib.models import llama
from lib.models.hf_config import WINDOW_KEYS, boolean, one_rope, qwen_windows, shared_numbers
from lib.models.spec import DecoderSpec
from lib.models.weights import WeightTable

MODEL_TYPE = "qwen3"
ARCHITECTURES = ("Qwen3ForCausalLM",)
HEAD_DIM = 128

QK_NORM_NAMES: WeightTable = {
    "model.layers.{i}.self_attn.q_norm.weight": "layers.{i}.attn.q_norm.weight",
    "model.layers.{i}.self_attn.k_norm.weight": "layers.{i}.attn.k_norm.weight",
}
WEIGHT_NAMES: WeightTable = {**llama.BODY_NAMES, **QK_NORM_NAMES, **llama.MLP_NAMES}
DERIVED_WEIGHTS: tuple[str, ...] = ()

FIXED_KEYS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
NUMBER_KEYS = frozenset({"attention_bias"}) | WINDOW_KEYS


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Numbers of a `config.json`, in the defaults of transformers' Qwen3Config.

    Raises:
        ModelError: a number is missing, of the wrong type, out of range, or contradicts another.
    """
    numbers = shared_numbers(config, head_dim=HEAD_DIM)
    attention_bias = boolean(config, "attention_bias")
    return DecoderSpec(
        family=MODEL_TYPE,
        **numbers,
        rope=one_rope(config),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm="head",
        windows=qwen_windows(config, numbers["num_layers"]),
    )

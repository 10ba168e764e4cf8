"""The OLMo 2 family: as llama, but norms stand after attention and MLP, and one norm spans all query or key heads."""

from collections.abc import Mapping
from typing import Any

from lib.models import llama, qwen3
from lib.models.hf_config import boolean, one_rope, shared_numbers
from lib.models.spec import DecoderSpec
from lib.models.weights import WeightTable

MODEL_TYPE = "olmo2"
ARCHITECTURES = ("Olmo2ForCausalLM",)

NORM_NAMES: WeightTable = {
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.attn_post_norm.weight",
    "model.layers.{i}.post_feedforward_layernorm.weight": "layers.{i}.mlp_post_norm.weight",
}
WEIGHT_NAMES: WeightTable = {**llama.BODY_NAMES, **qwen3.QK_NORM_NAMES, **llama.MLP_NAMES, **NORM_NAMES}
DERIVED_WEIGHTS: tuple[str, ...] = ()

FIXED_KEYS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
NUMBER_KEYS = frozenset({"attention_bias"})


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Numbers of a `config.json`, in the defaults of transformers' Olmo2Config.

    Raises:
        ModelError: a number is missing, of the wrong type, out of range, or contradicts another.
    """
    attention_bias = boolean(config, "attention_bias")
    return DecoderSpec(
        family=MODEL_TYPE,
        **shared_numbers({"rms_norm_eps": 1e-5, **config}),
        rope=one_rope(config),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm="all",
        norm_order="post",
    )

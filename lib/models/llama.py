"""The llama family (Llama 1-3, SmolLM2, and others with `LlamaForCausalLM`): numbers and weight names."""

from collections.abc import Mapping
from typing import Any

from lib.models.hf_config import boolean, one_rope, shared_numbers
from lib.models.spec import DecoderSpec
from lib.models.weights import WeightTable

MODEL_TYPE = "llama"
ARCHITECTURES = ("LlamaForCausalLM",)

BODY_NAMES: WeightTable = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.attn_norm.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "layers.{i}.attn.q.weight",
    "model.layers.{i}.self_attn.q_proj.bias": "layers.{i}.attn.q.bias",
    "model.layers.{i}.self_attn.k_proj.weight": "layers.{i}.attn.k.weight",
    "model.layers.{i}.self_attn.k_proj.bias": "layers.{i}.attn.k.bias",
    "model.layers.{i}.self_attn.v_proj.weight": "layers.{i}.attn.v.weight",
    "model.layers.{i}.self_attn.v_proj.bias": "layers.{i}.attn.v.bias",
    "model.layers.{i}.self_attn.o_proj.weight": "layers.{i}.attn.o.weight",
    "model.layers.{i}.self_attn.o_proj.bias": "layers.{i}.attn.o.bias",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.mlp_norm.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
"""All but the MLP, as most families call it."""
MLP_NAMES: WeightTable = {
    "model.layers.{i}.mlp.gate_proj.weight": "layers.{i}.mlp.gate.weight",
    "model.layers.{i}.mlp.gate_proj.bias": "layers.{i}.mlp.gate.bias",
    "model.layers.{i}.mlp.up_proj.weight": "layers.{i}.mlp.up.weight",
    "model.layers.{i}.mlp.up_proj.bias": "layers.{i}.mlp.up.bias",
    "model.layers.{i}.mlp.down_proj.weight": "layers.{i}.mlp.down.weight",
    "model.layers.{i}.mlp.down_proj.bias": "layers.{i}.mlp.down.bias",
}
WEIGHT_NAMES: WeightTable = {**BODY_NAMES, **MLP_NAMES}
"""Name in a checkpoint -> name in our decoder; `{i}` is the layer. Biases and head only where the spec has them."""
DERIVED_WEIGHTS = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry and that follow from the config."""

FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "sliding_window": (None,),
    "is_llama_config": (True,),
}
NUMBER_KEYS = frozenset({"attention_bias", "mlp_bias"})


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Numbers of a `config.json`, in the defaults of transformers' LlamaConfig.

    Raises:
        ModelError: a number is missing, of the wrong type, out of range, or contradicts another.
    """
    attention_bias = boolean(config, "attention_bias")
    return DecoderSpec(
        family=MODEL_TYPE,
        **shared_numbers(config),
        rope=one_rope(config),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=boolean(config, "mlp_bias"),
    )

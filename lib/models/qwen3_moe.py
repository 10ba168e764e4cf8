"""The Qwen3-MoE family: Qwen3's attention, and experts in all layers but those that the config excepts."""

from collections.abc import Mapping
from typing import Any

from lib.core.errors import ModelError
from lib.models import llama, qwen3
from lib.models.hf_config import boolean, integer, one_rope, same, shared_numbers
from lib.models.spec import DecoderSpec, MoeSpec
from lib.models.weights import WeightTable

MODEL_TYPE = "qwen3_moe"
ARCHITECTURES = ("Qwen3MoeForCausalLM",)

EXPERT_NAMES: WeightTable = {
    "model.layers.{i}.mlp.gate.weight": "layers.{i}.mlp.router.weight",
    "model.layers.{i}.mlp.experts.{e}.gate_proj.weight": "layers.{i}.mlp.experts.gate.weight",
    "model.layers.{i}.mlp.experts.{e}.up_proj.weight": "layers.{i}.mlp.experts.up.weight",
    "model.layers.{i}.mlp.experts.{e}.down_proj.weight": "layers.{i}.mlp.experts.down.weight",
}
"""`{e}` is the expert: a checkpoint holds them one by one."""
WEIGHT_NAMES: WeightTable = {**llama.BODY_NAMES, **qwen3.QK_NORM_NAMES, **llama.MLP_NAMES, **EXPERT_NAMES}
DERIVED_WEIGHTS: tuple[str, ...] = ()

FIXED_KEYS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
NUMBER_KEYS = frozenset(
    {"attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "mlp_only_layers", "decoder_sparse_step"}
    | {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
)
"""max_window_layers is read by no version of transformers: a window, where one is used, is in all layers."""


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Numbers of a `config.json`, in the defaults of transformers' Qwen3MoeConfig.

    Raises:
        ModelError: a number is missing, of the wrong type, out of range, or contradicts another.
    """
    numbers = shared_numbers(config)
    num_layers, attention_bias = numbers["num_layers"], boolean(config, "attention_bias")
    window = integer(config, "sliding_window", 4096) if boolean(config, "use_sliding_window") else None
    return DecoderSpec(
        family=MODEL_TYPE,
        **numbers,
        rope=one_rope(config),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm="head",
        windows=(window,) * num_layers,
        moe=_experts(config, num_layers),
    )


def _experts(config: Mapping[str, Any], num_layers: int) -> MoeSpec:
    step, without = integer(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(without, list) or not set(without) <= set(range(num_layers)):
        raise ModelError(f"config.json: mlp_only_layers is {without!r}; expected numbers of the {num_layers} layers")
    num_experts, top_k = same(config, "num_experts", "num_local_experts"), integer(config, "num_experts_per_tok", 8)
    if top_k > num_experts:
        raise ModelError(f"config.json: num_experts_per_tok {top_k} is above the number of experts {num_experts}")
    return MoeSpec(
        layers=tuple(layer for layer in range(num_layers) if layer not in without and (layer + 1) % step == 0),
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=integer(config, "moe_intermediate_size", 768),
        weights="softmax_renormalised" if boolean(config, "norm_topk_prob") else "softmax",
    )

"""The gpt-oss family: experts with biases and a clamped gate in every layer, attention sinks, a window in every second
layer. Its checkpoints hold gate and up of all experts in one transposed tensor, column by column in turn.
"""

from collections.abc import Mapping
from typing import Any

from lib.core.errors import ModelError
from lib.models import llama
from lib.models.hf_config import boolean, integer, layer_windows, mapping, one_rope, real, same, shared_numbers
from lib.models.spec import DecoderSpec, Gate, MoeSpec
from lib.models.weights import Fused, WeightTable

MODEL_TYPE = "gpt_oss"
ARCHITECTURES = ("GptOssForCausalLM",)
HEAD_DIM, THETA, WINDOW = 64, 150_000.0, 128

_EXPERTS = "layers.{i}.mlp.experts"
WEIGHT_NAMES: WeightTable = {
    **llama.BODY_NAMES,
    "model.layers.{i}.self_attn.sinks": "layers.{i}.attn.sinks",
    "model.layers.{i}.mlp.router.weight": "layers.{i}.mlp.router.weight",
    "model.layers.{i}.mlp.router.bias": "layers.{i}.mlp.router.bias",
    "model.layers.{i}.mlp.experts.gate_up_proj": Fused((f"{_EXPERTS}.gate.weight", f"{_EXPERTS}.up.weight"), transposed=True),
    "model.layers.{i}.mlp.experts.gate_up_proj_bias": Fused((f"{_EXPERTS}.gate.bias", f"{_EXPERTS}.up.bias")),
    "model.layers.{i}.mlp.experts.down_proj": Fused((f"{_EXPERTS}.down.weight",), transposed=True),
    "model.layers.{i}.mlp.experts.down_proj_bias": f"{_EXPERTS}.down.bias",
}
DERIVED_WEIGHTS: tuple[str, ...] = ()

FIXED_KEYS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
NUMBER_KEYS = frozenset(
    {"attention_bias", "sliding_window", "layer_types", "num_local_experts", "num_experts", "num_experts_per_tok"}
    | {"experts_per_token", "swiglu_alpha", "swiglu_limit", "initial_context_length"}
)


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Numbers of a `config.json`, in the defaults of transformers' GptOssConfig.

    Raises:
        ModelError: a number is missing, of the wrong type, out of range, or contradicts another.
    """
    numbers = shared_numbers(config, head_dim=HEAD_DIM)
    num_layers, attention_bias = numbers["num_layers"], boolean(config, "attention_bias", True)
    if not mapping(config, "rope_parameters") and not mapping(config, "rope_scaling"):
        raise ModelError("config.json: neither rope_parameters nor rope_scaling is set; gpt-oss needs its yarn numbers")
    rope = one_rope(config, theta=THETA)
    if rope.scaling:
        same({**config, "rope": rope.scaling.original_max_positions}, "rope", "initial_context_length")
    return DecoderSpec(
        family=MODEL_TYPE,
        **numbers,
        rope=rope,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        windows=layer_windows(
            config, integer(config, "sliding_window", WINDOW), [layer % 2 == 0 for layer in range(num_layers)]
        ),
        sinks=True,
        gate=Gate("clamped", real(config, "swiglu_alpha", 1.702), real(config, "swiglu_limit", 7.0)),
        moe=_experts(config, num_layers, numbers["intermediate_size"]),
    )


def _experts(config: Mapping[str, Any], num_layers: int, intermediate_size: int) -> MoeSpec:
    num_experts = same(config, "num_local_experts", "num_experts", default=128)
    top_k = same(config, "num_experts_per_tok", "experts_per_token", default=4)
    if top_k > num_experts:
        raise ModelError(f"config.json: num_experts_per_tok {top_k} is above the number of experts {num_experts}")
    return MoeSpec(
        layers=tuple(range(num_layers)),
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=intermediate_size,
        weights="softmax_of_chosen",
        bias=True,
    )

"""The text models of the Gemma 3 family: windows in five of six layers with rotary positions of their own, norms before
and after with weights around zero, a norm on each query and key head, scaled embeddings, tanh on the logits where set.
"""

from collections.abc import Mapping
from typing import Any

from lib.core.errors import ModelError
from lib.models import llama, qwen3
from lib.models.hf_config import boolean, integer, layer_windows, mapping, optional_real, real, rope_of, shared_numbers
from lib.models.spec import DecoderSpec, Gate, Rope
from lib.models.weights import WeightTable

MODEL_TYPE = "gemma3_text"
ARCHITECTURES = ("Gemma3ForCausalLM",)
HEAD_DIM, WINDOW, PATTERN = 256, 4096, 6
THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
LOCAL, GLOBAL = "sliding_attention", "full_attention"

NORM_NAMES: WeightTable = {
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.attn_post_norm.weight",
    "model.layers.{i}.pre_feedforward_layernorm.weight": "layers.{i}.mlp_norm.weight",
    "model.layers.{i}.post_feedforward_layernorm.weight": "layers.{i}.mlp_post_norm.weight",
}
"""What llama calls post_attention_layernorm stands before the MLP; here it stands after the attention."""
WEIGHT_NAMES: WeightTable = {**llama.BODY_NAMES, **qwen3.QK_NORM_NAMES, **llama.MLP_NAMES, **NORM_NAMES}
DERIVED_WEIGHTS: tuple[str, ...] = ()

FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_act": ("gelu_pytorch_tanh", None),
    "use_bidirectional_attention": (False, None),
    # transformers reads it and does not apply it, so that what the model should compute can't be known.
    "attn_logit_softcapping": (None,),
}
NUMBER_KEYS = frozenset(
    {"attention_bias", "query_pre_attn_scalar", "sliding_window", "sliding_window_pattern", "_sliding_window_pattern"}
    | {"layer_types", "final_logit_softcapping", "rope_local_base_freq"}
)


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Numbers of a `config.json`, in the defaults of transformers' Gemma3TextConfig.

    Raises:
        ModelError: a number is missing, of the wrong type, out of range, or contradicts another.
    """
    numbers = shared_numbers(config, head_dim=HEAD_DIM, tied=True)
    attention_bias = boolean(config, "attention_bias")
    every = integer(config, "sliding_window_pattern", integer(config, "_sliding_window_pattern", PATTERN))
    slides = [bool((layer + 1) % every) for layer in range(numbers["num_layers"])]
    rope, local_rope = _ropes(config)
    return DecoderSpec(
        family=MODEL_TYPE,
        **numbers,
        rope=rope,
        local_rope=local_rope,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        windows=layer_windows(config, integer(config, "sliding_window", WINDOW), slides),
        query_scale=real(config, "query_pre_attn_scalar", 256) ** -0.5,
        qk_norm="head",
        norm_order="both",
        norm_offset=1.0,
        gate=Gate("gelu_tanh"),
        embed_scale=numbers["hidden_size"] ** 0.5,
        logit_softcap=optional_real(config, "final_logit_softcapping"),
    )


def _ropes(config: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """(of the global layers, of those with a window): nested by layer type (transformers 5), or old flat keys."""
    new = mapping(config, "rope_parameters")
    if new and not new.keys() <= {LOCAL, GLOBAL}:
        raise ModelError(f"config.json: rope_parameters is {new!r}; expected one mapping for {LOCAL} and one for {GLOBAL}")
    return (
        rope_of(mapping(new, GLOBAL), config, theta=THETA),
        rope_of(mapping(new, LOCAL), config, theta=LOCAL_THETA, theta_key="rope_local_base_freq", scaling_key=None),
    )

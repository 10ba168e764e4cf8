"""The llama family (Llama 1-3, SmolLM2, and others with `LlamaForCausalLM`): numbers and weight names."""

from collections.abc import Mapping
from typing import Any, Literal, cast

from lib.core.errors import ModelError
from lib.models.spec import DecoderSpec, RopeScaling

ARCHITECTURES = ("LlamaForCausalLM",)

WEIGHT_NAMES = {
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
    "model.layers.{i}.mlp.gate_proj.weight": "layers.{i}.mlp.gate.weight",
    "model.layers.{i}.mlp.gate_proj.bias": "layers.{i}.mlp.gate.bias",
    "model.layers.{i}.mlp.up_proj.weight": "layers.{i}.mlp.up.weight",
    "model.layers.{i}.mlp.up_proj.bias": "layers.{i}.mlp.up.bias",
    "model.layers.{i}.mlp.down_proj.weight": "layers.{i}.mlp.down.weight",
    "model.layers.{i}.mlp.down_proj.bias": "layers.{i}.mlp.down.bias",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
"""Name in a checkpoint -> name in our decoder; `{i}` is the layer. Biases and head only where the spec has them."""

DERIVED_WEIGHTS = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry and that follow from the config."""

FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "attention_dropout": (0, 0.0, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, 1, None),
    "sliding_window": (None,),
    "is_llama_config": (True,),
    "is_decoder": (True, False, None),
}
"""Config keys that would change the numbers, with the values that this decoder computes."""

NUMBER_KEYS = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    | {"head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias"}
    | {"rope_theta", "rope_scaling", "rope_parameters"}
)
"""Config keys that `spec_from_config` reads."""


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Numbers of a `config.json`, in the defaults of transformers' LlamaConfig.

    Raises:
        ModelError: a number is missing, of the wrong type, out of range, or contradicts another.
    """
    hidden_size, num_heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    num_kv_heads = _integer(config, "num_key_value_heads", num_heads)
    head_dim = _integer(config, "head_dim", hidden_size // num_heads)
    max_positions = _integer(config, "max_position_embeddings", 2048)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 2 or (config.get("head_dim") is None and hidden_size % num_heads):
        raise ModelError(f"config.json: head_dim must be even and given where {num_heads} heads don't divide {hidden_size}")
    theta, scaling = _rope(config, max_positions)
    return DecoderSpec(
        family="llama",
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(config, "intermediate_size"),
        num_layers=_integer(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_real(config, "rms_norm_eps", 1e-6),
        tied=_boolean(config, "tie_word_embeddings"),
        attention_bias=_boolean(config, "attention_bias"),
        mlp_bias=_boolean(config, "mlp_bias"),
    )


def _rope(config: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and stretching, from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before)."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, Mapping):
            raise ModelError(f"config.json: {name} is {value!r}; expected a mapping or null")
    given = {**(old or {}), **(new or {})}
    if new and old and any(new.get(key, value) != value for key, value in old.items()):
        raise ModelError(f"config.json: rope_parameters {new!r} and rope_scaling {old!r} contradict each other; keep one")
    kind = given.pop("rope_type", None) or given.get("type", "default")
    given.pop("type", None)
    theta = _real(given, "rope_theta", _real(config, "rope_theta", 10000.0))
    if config.get("rope_theta") not in (None, theta):
        raise ModelError(f"config.json: rope_theta {config['rope_theta']!r} contradicts rope_parameters' {theta!r}; keep one")
    given.pop("rope_theta", None)
    if given.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise ModelError("config.json: partial_rotary_factor other than 1 is not supported for llama")
    return theta, _scaling(str(kind), given, max_positions)


def _scaling(kind: str, given: dict[str, Any], max_positions: int) -> RopeScaling | None:
    keys = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }
    if kind not in keys:
        raise ModelError(f"config.json: rope type {kind!r} is not supported; known: {', '.join(keys)}")
    unknown = given.keys() - keys[kind] - {"original_max_position_embeddings", "max_position_embeddings"}
    if unknown:
        raise ModelError(f"config.json: unknown key(s) {sorted(unknown)} for rope type {kind!r}")
    if kind == "default":
        return None
    factor = _real(given, "factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    low, high = _real(given, "low_freq_factor"), _real(given, "high_freq_factor")
    if low >= high:
        raise ModelError(f"config.json: low_freq_factor {low} is not below high_freq_factor {high}")
    original = _integer(given, "original_max_position_embeddings", max_positions)
    return RopeScaling(cast(Literal["llama3"], kind), factor, low, high, original)


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {key} is {value!r}; expected a whole number above 0")
    return value


def _real(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise ModelError(f"config.json: {key} is {value!r}; expected a finite number above 0")
    return float(value)


def _boolean(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value not in (True, False, None):
        raise ModelError(f"config.json: {key} is {value!r}; expected true or false")
    return bool(value)

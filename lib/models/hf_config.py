"""Checked numbers out of a `config.json`, in both spellings of transformers: before version 5 and since."""

import math
from collections.abc import Mapping
from typing import Any

from lib.core.errors import ModelError
from lib.models.spec import Rope, RopeScaling

SHARED_KEYS = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    | {"head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"}
    | {"rope_theta", "rope_scaling", "rope_parameters"}
)
"""Config keys that `shared_numbers` and `one_rope` read."""
WINDOW_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
"""Config keys that `qwen_windows` reads."""
SHARED_FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, 0.0, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, 1, None),
    "is_decoder": (True, False, None),
}
"""Config keys that would change the numbers, with the values that every family computes."""

_SCALING_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"},
}


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number above 0; `default` where the key is missing or null. Raises ModelError for anything else."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {key} is {value!r}; expected a whole number above 0")
    return value


def real(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number above 0; `default` where the key is missing or null. Raises ModelError for anything else."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise ModelError(f"config.json: {key} is {value!r}; expected a finite number above 0")
    return float(value)


def optional_real(config: Mapping[str, Any], key: str) -> float | None:
    """As `real`, or None where the key is missing or null."""
    return None if config.get(key) is None else real(config, key)


def boolean(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """True or false; `default` where the key is missing or null. Raises ModelError for anything else."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"config.json: {key} is {value!r}; expected true or false")
    return default if value is None else value


def same(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """A whole number that goes by several names. Raises ModelError where two are there and differ."""
    given = {key: integer(config, key) for key in keys if config.get(key) is not None}
    if len(set(given.values())) > 1:
        raise ModelError(f"config.json: {given} contradict each other; keep one")
    return integer({keys[0]: next(iter(given.values()), None)}, keys[0], default)


def shared_numbers(config: Mapping[str, Any], *, head_dim: int | None = None, tied: bool = False) -> dict[str, Any]:
    """The fields of a DecoderSpec that all families read alike.

    Args:
        head_dim: the family's default; None: hidden_size / num_attention_heads.
        tied: the family's default.
    Raises:
        ModelError: a number is missing, of the wrong type, out of range, or contradicts another.
    """
    hidden_size, num_heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    num_kv_heads = integer(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if head_dim is None and config.get("head_dim") is None and hidden_size % num_heads:
        raise ModelError(f"config.json: head_dim must be given where {num_heads} heads don't divide {hidden_size}")
    head_dim = integer(config, "head_dim", head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise ModelError(f"config.json: head_dim {head_dim} is odd; rotary positions turn pairs of channels")
    return {
        "vocab_size": integer(config, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": integer(config, "intermediate_size"),
        "num_layers": integer(config, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_positions": integer(config, "max_position_embeddings", 2048),
        "norm_eps": real(config, "rms_norm_eps", 1e-6),
        "tied": boolean(config, "tie_word_embeddings", tied),
    }


def one_rope(config: Mapping[str, Any], *, theta: float = 10000.0) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before); `theta` is the family's default."""
    return rope_of(mapping(config, "rope_parameters"), config, theta=theta)


def rope_of(
    new: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    theta: float,
    theta_key: str = "rope_theta",
    scaling_key: str | None = "rope_scaling",
) -> Rope:
    """Rotary positions of a mapping in the new spelling and what the config says in the old one; they must agree.

    Args:
        theta: the family's default.
        theta_key, scaling_key: where the old spelling has base and stretching.
    """
    old = mapping(config, scaling_key) if scaling_key else {}
    if new and any(new.get(key, value) != value for key, value in old.items()):
        raise ModelError(f"config.json: rope_parameters {new!r} and {scaling_key} {old!r} contradict each other; keep one")
    given, theta = {**old, **new}, real(config, theta_key, theta)
    kind = given.pop("rope_type", None) or given.get("type", "default")
    given.pop("type", None)
    theta = real(given, "rope_theta", theta)
    if config.get(theta_key) not in (None, theta):
        raise ModelError(
            f"config.json: {theta_key} {config[theta_key]!r} contradicts rope_theta {theta!r} of the rope parameters; keep one"
        )
    given.pop("rope_theta", None)
    if given.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise ModelError("config.json: partial_rotary_factor other than 1 is not supported")
    return Rope(theta, _scaling(str(kind), given, integer(config, "max_position_embeddings", 2048)))


def mapping(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object, empty where the key is missing or null. Raises ModelError for anything else."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ModelError(f"config.json: {key} is {value!r}; expected a mapping or null")
    return dict(value or {})


def _scaling(kind: str, given: dict[str, Any], max_positions: int) -> RopeScaling | None:
    if kind not in _SCALING_KEYS:
        raise ModelError(f"config.json: rope type {kind!r} is not supported; known: {', '.join(_SCALING_KEYS)}")
    unknown = given.keys() - _SCALING_KEYS[kind] - {"original_max_position_embeddings", "max_position_embeddings"}
    if unknown:
        raise ModelError(f"config.json: unknown key(s) {sorted(unknown)} for rope type {kind!r}")
    if kind == "default":
        return None
    factor = real(given, "factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    original = integer(given, "original_max_position_embeddings", max_positions)
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor,
            original_max_positions=original,
            fast_rotations=real(given, "beta_fast", 32.0),
            slow_rotations=real(given, "beta_slow", 1.0),
            whole_channels=boolean(given, "truncate", True),
            magnitude=real(given, "attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0),
        )
    low, high = real(given, "low_freq_factor"), real(given, "high_freq_factor")
    if low >= high:
        raise ModelError(f"config.json: low_freq_factor {low} is not below high_freq_factor {high}")
    return RopeScaling("llama3", factor, low, high, original)


def layer_windows(config: Mapping[str, Any], window: int | None, default: list[bool]) -> tuple[int | None, ...]:
    """The window of each layer by `layer_types`; where that is not given, of the layers that `default` marks.

    Raises:
        ModelError: another number of layers, an unknown type, or a layer that slides without a `sliding_window`.
    """
    names = {True: "sliding_attention", False: "full_attention"}
    types = config.get("layer_types")
    types = [names[slides] for slides in default] if types is None else types
    if not isinstance(types, list) or len(types) != len(default) or not set(types) <= set(names.values()):
        raise ModelError(f"config.json: layer_types is {types!r}; expected {len(default)} of {sorted(names.values())}")
    if "sliding_attention" in types and window is None:
        raise ModelError("config.json: layer_types has sliding_attention, but sliding_window is not set")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def qwen_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Windows from layer `max_window_layers` on where `use_sliding_window`, unless `layer_types` names them."""
    used = boolean(config, "use_sliding_window")
    window = integer(config, "sliding_window", 4096) if used else None
    first = config.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ModelError(f"config.json: max_window_layers is {first!r}; expected a whole number from 0 on")
    return layer_windows(config, window, [used and layer >= first for layer in range(num_layers)])

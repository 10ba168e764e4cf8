"""The Qwen2 family (Qwen2, Qwen2.5): as llama, with biases on queries, keys and values, and windows where asked for."""

from collections.abc import Mapping
from typing import Any

from lib.models import llama
from lib.models.hf_config import WINDOW_KEYS, one_rope, qwen_windows, shared_numbers
from lib.models.spec import DecoderSpec
from lib.models.weights import WeightTable

MODEL_TYPE = "qwen2"
ARCHITECTURES = ("Qwen2ForCausalLM",)

WEIGHT_NAMES: WeightTable = llama.WEIGHT_NAMES
DERIVED_WEIGHTS: tuple[str, ...] = ()

FIXED_KEYS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "use_mrope": (False, None)}
NUMBER_KEYS = WINDOW_KEYS


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Numbers of a `config.json`, in the defaults of transformers' Qwen2Config.

    Raises:
        ModelError: a number is missing, of the wrong type, out of range, or contradicts another.
    """
    numbers = shared_numbers(config)
    return DecoderSpec(
        family=MODEL_TYPE,
        **numbers,
        rope=one_rope(config),
        qkv_bias=True,
        windows=qwen_windows(config, numbers["num_layers"]),
    )

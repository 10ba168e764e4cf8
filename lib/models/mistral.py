"""The Mistral family: as llama without biases, with one window in every layer where the config has one."""

from collections.abc import Mapping
from typing import Any

from lib.models import llama
from lib.models.hf_config import integer, one_rope, shared_numbers
from lib.models.spec import DecoderSpec
from lib.models.weights import WeightTable

MODEL_TYPE = "mistral"
ARCHITECTURES = ("MistralForCausalLM",)

WEIGHT_NAMES: WeightTable = llama.WEIGHT_NAMES
DERIVED_WEIGHTS = llama.DERIVED_WEIGHTS

FIXED_KEYS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
NUMBER_KEYS = frozenset({"sliding_window"})


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Numbers of a `config.json`, in the defaults of transformers' MistralConfig: a window of 4096 unless null is written.

    Raises:
        ModelError: a number is missing, of the wrong type, out of range, or contradicts another.
    """
    numbers = shared_numbers(config)
    window = None if config.get("sliding_window", 4096) is None else integer(config, "sliding_window", 4096)
    return DecoderSpec(family=MODEL_TYPE, **numbers, rope=one_rope(config), windows=(window,) * numbers["num_layers"])

"""How a model is cut into parts that ranks compute together: by names of parameters, one plan for all families.

A region, attention or a gated MLP, begins with weights that are cut by outputs (heads, features) and ends with one that is
cut by inputs, so that its result is a sum over the ranks. Of embedding and head each rank has some of the rows. Between the
regions each rank has some of the tokens of every row, so that norms, and what is kept for the backward pass, are cut too.
"""

import re
from enum import Enum

from lib.config.model import ModelConfig
from lib.config.parallel import ParallelConfig
from lib.core.errors import ConfigError
from lib.models.spec import DecoderSpec


class Part(Enum):
    """What a rank of the tensor axis holds of a parameter."""

    OUTPUTS = "rows of a matrix [..., O, I]"
    INPUTS = "columns of a matrix [..., O, I]"
    NUMBERS = "some of the last dimension"
    SHARED = "all of it; used for a rank's own tokens or heads, so the gradient is a sum over the ranks"
    ONCE = "all of it; added to the result of a region, which is a sum over the ranks, so one of them adds it"
    WHOLE = "all of it; used alike by all ranks"


_PREFIX = r"(?:.*\.)?"
_LAYER = rf"{_PREFIX}layers\.\d+\."
CUT_BY_OUTPUTS = rf"(?:{_LAYER}(?:attn\.[qkv]|mlp\.(?:experts\.)?(?:gate|up))|{_PREFIX}(?:embed|head))"
CUT_BY_INPUTS = rf"(?P<region>{_LAYER}(?:attn|mlp|mlp\.experts))\.(?:o|down)"
PLAN = {
    rf"{CUT_BY_OUTPUTS}\.(?:weight|lora\.b)": Part.OUTPUTS,
    rf"{CUT_BY_OUTPUTS}\.bias": Part.NUMBERS,
    rf"{CUT_BY_OUTPUTS}\.lora\.a": Part.SHARED,
    rf"{CUT_BY_INPUTS}\.(?:weight|lora\.a)": Part.INPUTS,
    rf"{CUT_BY_INPUTS}\.bias": Part.ONCE,
    rf"{CUT_BY_INPUTS}\.lora\.b": Part.SHARED,
    rf"{_LAYER}attn\.sinks": Part.NUMBERS,
    rf"(?:{_LAYER}\w+_|{_PREFIX})norm\.weight": Part.SHARED,
}
"""Pattern of a parameter's name -> how it is cut; what matches none is WHOLE."""
HEAD_NORM = rf"{_LAYER}attn\.[qk]_norm"
"""Cut where it spans all heads; one that each head goes through by itself is shared."""


def part_of(name: str, spec: DecoderSpec) -> Part:
    """How a parameter of a module that holds a decoder is cut."""
    if re.fullmatch(rf"{HEAD_NORM}\.weight", name):
        return Part.NUMBERS if spec.qk_norm == "all" else Part.SHARED
    return next((part for pattern, part in PLAN.items() if re.fullmatch(pattern, name)), Part.WHOLE)


def check_plan(parallel: ParallelConfig, num_ranks: int, *, spec: DecoderSpec | None, model: ModelConfig) -> None:
    """Refuse sizes that a model can't be cut into; what no model can be, its configuration refuses.

    Args:
        spec: of the model; None where it is of no family here.
    Raises:
        ConfigError: names the size, the number of the model that doesn't fit, and the remedy.
    """
    if spec is None and model.compile != "none":
        raise ConfigError("config.model.compile is 'layer', but the model is of no family here; leave it out")
    if parallel.expert > 1:
        _check_experts(parallel.expert, parallel.sizes(num_ranks)["shard"], spec)
    if parallel.tensor > 1:
        _check_layers(parallel, spec)


def _check_layers(parallel: ParallelConfig, spec: DecoderSpec | None) -> None:
    asked = f"config.parallel.tensor is {parallel.tensor}"
    if spec is None:
        raise ConfigError(f"{asked}, but the model is of no family here; leave it out, and the ranks shard the weights")
    for what, number in _cut_numbers(spec).items():
        if number % parallel.tensor:
            raise ConfigError(f"{asked}, which doesn't divide the model's {number} {what}; choose a divisor, or leave it out")


def _cut_numbers(spec: DecoderSpec) -> dict[str, int]:
    """What -> number that the tensor axis must divide."""
    numbers = {"attention heads": spec.num_heads, "key-value heads": spec.num_kv_heads}
    if not all(spec.has_experts(layer) for layer in range(spec.num_layers)):
        numbers["features of an MLP (intermediate_size)"] = spec.intermediate_size
    if spec.moe:
        numbers["features of an expert"] = spec.moe.intermediate_size
    return {**numbers, "rows of the vocabulary (a multiple of 64)": spec.num_rows}


def _check_experts(num_ranks: int, num_shards: int, spec: DecoderSpec | None) -> None:
    asked = f"config.parallel.expert is {num_ranks}"
    if spec is None or spec.moe is None:
        kind = "of no family here" if spec is None else f"a {spec.family} model without experts"
        raise ConfigError(f"{asked}, but the model is {kind}; leave it out, and the ranks shard the weights")
    if spec.moe.num_experts % num_ranks:
        raise ConfigError(f"{asked}, which doesn't divide the model's {spec.moe.num_experts} experts; choose a divisor")
    for name, size in (("hidden size", spec.hidden_size), ("intermediate size", spec.moe.intermediate_size)):
        if size % num_shards:
            raise ConfigError(
                f"{asked}, which leaves {num_shards} shards of each expert, and they don't divide its {name} of {size}; "
                "choose a larger config.parallel.expert, or another number of ranks"
            )

"""The model families that are known, and the gate that a `config.json` passes before anything is loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lib.core.errors import ModelError
from lib.models import llama
from lib.models.spec import DecoderSpec

NEUTRAL_KEYS = frozenset(
    {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "transformers.js_config", "_name_or_path"}
    | {"use_cache", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"}
    | {"return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "chunk_size_feed_forward"}
    | {"id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class", "finetuning_task"}
    | {"is_encoder_decoder", "prefix", "pruned_heads", "tie_encoder_decoder", "_attn_implementation_autoset", "max_length"}
    | {"unsloth_fixed", "unsloth_version", "_attn_implementation", "attn_implementation", "decoder_start_token_id"}
)
"""Config keys that don't change what a decoder computes."""


@dataclass(frozen=True)
class Family:
    """A kind of model: how its config and its weights are read."""

    name: str
    """`model_type` in config.json."""
    architectures: tuple[str, ...]
    spec_from_config: Callable[[Mapping[str, Any]], DecoderSpec]
    weight_names: Mapping[str, str]
    """Pattern of a checkpoint's tensor name -> pattern of ours, `{i}` for the layer."""
    derived_weights: tuple[str, ...]
    """Patterns of tensors in old checkpoints that follow from the config; left unread."""
    number_keys: frozenset[str]
    """Config keys that become the spec."""
    fixed_keys: Mapping[str, tuple[Any, ...]]
    """Config keys that may only have these values."""

    def hf_names(self, spec: DecoderSpec) -> dict[str, str]:
        """Our parameter name -> name in the checkpoint, for every parameter that a decoder of `spec` has."""
        names = {}
        for hf_pattern, our_pattern in self.weight_names.items():
            if not _has(spec, our_pattern):
                continue
            for i in range(spec.num_layers) if "{i}" in our_pattern else (0,):
                names[our_pattern.format(i=i)] = hf_pattern.format(i=i)
        return names


FAMILIES: dict[str, Family] = {
    "llama": Family(
        name="llama",
        architectures=llama.ARCHITECTURES,
        spec_from_config=llama.spec_from_config,
        weight_names=llama.WEIGHT_NAMES,
        derived_weights=llama.DERIVED_WEIGHTS,
        number_keys=llama.NUMBER_KEYS,
        fixed_keys=llama.FIXED_KEYS,
    ),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that computes exactly what this `config.json` describes.

    Raises:
        ModelError: remote code, an unknown architecture, a key that is not known, or a value that is not supported.
    """
    if config.get("auto_map"):
        raise ModelError(
            f"config.json: auto_map {config['auto_map']!r} asks to run code from the model folder; never done here"
        )
    model_type, architectures = config.get("model_type"), list(config.get("architectures") or [])
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or len(architectures) != 1 or architectures[0] not in family.architectures:
        known = "; ".join(f"{item.name}: {', '.join(item.architectures)}" for item in FAMILIES.values())
        raise ModelError(
            f"config.json: model_type {model_type!r} with architectures {architectures!r} is unknown; known: {known}"
        )
    if config.get("quantization_config"):
        raise ModelError("config.json: quantization_config is set; give a folder with float weights")
    for key, allowed in family.fixed_keys.items():
        if key in config and config[key] not in allowed:
            raise ModelError(f"config.json: {key} is {config[key]!r}; {family.name} is supported with {allowed[0]!r} only")
    known_keys = NEUTRAL_KEYS | family.number_keys | family.fixed_keys.keys()
    unknown = sorted(key for key, value in config.items() if key not in known_keys and value is not None)
    if unknown:
        raise ModelError(
            f"config.json: unknown key(s) {unknown} for family {family.name}; they may change the numbers. Remove them "
            "if they don't (then the logit report will pass), else add them to the family"
        )
    return family


def family_of_spec(spec: DecoderSpec) -> Family:
    """The family that a decoder of this spec belongs to."""
    return FAMILIES[spec.family]


def _has(spec: DecoderSpec, our_pattern: str) -> bool:
    if our_pattern.endswith(".bias"):
        return spec.attention_bias if ".attn." in our_pattern else spec.mlp_bias
    return not (spec.tied and our_pattern == "head.weight")

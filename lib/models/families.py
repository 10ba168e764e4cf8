"""The model families that are known, and the gate that a `config.json` passes before anything is loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lib.core.errors import NO_REMOTE_CODE, ModelError
from lib.models import gemma3, gpt_oss, llama, mistral, olmo2, qwen2, qwen3, qwen3_moe
from lib.models.hf_config import SHARED_FIXED_KEYS, SHARED_KEYS
from lib.models.spec import DecoderSpec
from lib.models.weights import WeightMap, WeightTable

NEUTRAL_KEYS = frozenset(
    {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "transformers.js_config", "_name_or_path"}
    | {"use_cache", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"}
    | {"return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "chunk_size_feed_forward"}
    | {"id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class", "finetuning_task"}
    | {"is_encoder_decoder", "prefix", "pruned_heads", "tie_encoder_decoder", "_attn_implementation_autoset", "max_length"}
    | {"unsloth_fixed", "unsloth_version", "_attn_implementation", "attn_implementation", "decoder_start_token_id"}
    | {"output_router_logits", "router_aux_loss_coef", "cache_implementation"}
)
"""Config keys that don't change what a decoder computes."""
CLASSIFIER_HEAD = "score.weight"
"""Name of the weight of transformers' sequence classifiers, in every family."""


_CLASSIFIERS = {"gemma3_text": "Gemma3TextForSequenceClassification"}
"""Where the name doesn't follow from that of the language model."""


class FamilyModule(Protocol):
    """What the file of a family holds."""

    MODEL_TYPE: str
    """`model_type` in config.json."""
    ARCHITECTURES: tuple[str, ...]
    WEIGHT_NAMES: WeightTable
    DERIVED_WEIGHTS: tuple[str, ...]
    """Patterns of tensors in old checkpoints that follow from the config; left unread."""
    NUMBER_KEYS: frozenset[str]
    """Config keys that `spec_from_config` reads beside SHARED_KEYS."""
    FIXED_KEYS: Mapping[str, tuple[Any, ...]]
    """Config keys that may only have these values, beside SHARED_FIXED_KEYS."""

    @property
    def spec_from_config(self) -> Callable[[Mapping[str, Any]], DecoderSpec]: ...


@dataclass(frozen=True)
class Family:
    """A kind of model: how its config and its weights are read."""

    name: str
    architectures: tuple[str, ...]
    classifier: str
    """Architecture of the same decoder with one output for each document, in transformers."""
    spec_from_config: Callable[[Mapping[str, Any]], DecoderSpec]
    weight_names: WeightTable
    derived_weights: tuple[str, ...]
    number_keys: frozenset[str]
    fixed_keys: Mapping[str, tuple[Any, ...]]

    @staticmethod
    def of(module: FamilyModule) -> "Family":
        return Family(
            name=module.MODEL_TYPE,
            architectures=module.ARCHITECTURES,
            classifier=_CLASSIFIERS.get(module.MODEL_TYPE)
            or module.ARCHITECTURES[0].replace("ForCausalLM", "ForSequenceClassification"),
            spec_from_config=module.spec_from_config,
            weight_names=module.WEIGHT_NAMES,
            derived_weights=module.DERIVED_WEIGHTS,
            number_keys=module.NUMBER_KEYS | SHARED_KEYS,
            fixed_keys={**SHARED_FIXED_KEYS, **module.FIXED_KEYS},
        )

    def weight_map(self, spec: DecoderSpec) -> WeightMap:
        """Where every parameter of a decoder of `spec` lies in a checkpoint."""
        return WeightMap(self.weight_names, spec)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (Family.of(module) for module in (llama, qwen2, qwen3, qwen3_moe, gemma3, gpt_oss, olmo2, mistral))
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that computes exactly what this `config.json` describes.

    Raises:
        ModelError: remote code, an unknown architecture, a key that is not known, or a value that is not supported.
    """
    if config.get("auto_map"):
        raise ModelError(f"config.json: {NO_REMOTE_CODE}")
    model_type, architectures = config.get("model_type"), list(config.get("architectures") or [])
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or len(architectures) != 1 or architectures[0] not in (*family.architectures, family.classifier):
        known = "; ".join(f"{item.name}: {', '.join(item.architectures)}" for item in FAMILIES.values())
        raise ModelError(
            f"config.json: model_type {model_type!r} with architectures {architectures!r} is unknown; known: {known}"
        )
    if config.get("quantization_config"):
        raise ModelError(
            "config.json: quantization_config is set; give a folder with float weights. Only MXFP4 is decoded, when a model is "
            "prepared"
        )
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

"""Random small models of each family, drawn so that every number of the config matters to the logits."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.core_model_loading import revert_weight_conversion

from lib.core.seeding import derive_seed
from lib.models.decoder import Decoder
from lib.models.families import Family, family_of
from lib.models.hf_io import fill
from lib.models.spec import DecoderSpec, RopeScaling

Numbers = dict[str, Any]
WINDOWS = (1, 2, 5, 8, 30)
"""Against documents of up to 70 tokens: most end several windows behind where they began."""


@dataclass(frozen=True)
class RandomCase:
    """A drawn config, and how ours reads it."""

    config: Any
    """The config object of transformers."""
    model_class: type[PreTrainedModel]
    family: Family
    spec: DecoderSpec
    """What our family made of the config's JSON."""


class MemoryCheckpoint:
    """Tensors in memory, read as a checkpoint is."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def get_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        return self.tensors[name][slices].clone()


def _llama(rng: random.Random, index: int) -> Numbers:
    return {"attention_bias": index // 2 % 2 == 0, "mlp_bias": index // 4 % 2 == 0, "rope_parameters": _rope(rng, index)}


def _qwen2(rng: random.Random, index: int) -> Numbers:
    return {key: value for key, value in _qwen3(rng, index).items() if key != "attention_bias"}


def _mistral(rng: random.Random, index: int) -> Numbers:
    return {"sliding_window": rng.choice(WINDOWS) if index // 2 % 2 == 0 else None, "rope_parameters": _rope(rng, index)}


def _olmo2(rng: random.Random, index: int) -> Numbers:
    head_dim = rng.choice([8, 12, 32])
    return {"attention_bias": index // 2 % 2 == 0, "head_dim": head_dim, "rope_parameters": _rope(rng, index)}


def _qwen3(rng: random.Random, index: int) -> Numbers:
    windows = {"use_sliding_window": True, "sliding_window": rng.choice(WINDOWS), "max_window_layers": rng.choice([0, 1, 2])}
    return {
        "attention_bias": index // 2 % 2 == 0,
        "rope_parameters": _rope(rng, index),
        "head_dim": rng.choice([8, 16, 20]),
        **(windows if index // 4 % 2 == 0 else {}),
    }


def _qwen3_moe(rng: random.Random, index: int) -> Numbers:
    num_experts = rng.choice([3, 4, 8, 12])
    return {
        **_qwen3(rng, index),
        "num_hidden_layers": rng.choice([2, 3]),
        "num_experts": num_experts,
        "num_experts_per_tok": rng.choice([1, 2, 3]),
        "moe_intermediate_size": rng.choice([12, 20, 32]),
        "norm_topk_prob": index % 2 == 0,
        "decoder_sparse_step": 2 if index % 5 == 1 else 1,
        "mlp_only_layers": [0] if index % 5 == 2 else [],
    }


def _gemma3(rng: random.Random, index: int) -> Numbers:
    local, rotary = {"rope_type": "default", "rope_theta": rng.choice([50.0, 1000.0])}, _rope(rng, index % 2)
    return {
        "num_hidden_layers": rng.choice([2, 6, 7]) if index % 3 else 3,
        "layer_types": None if index % 3 else rng.sample(["sliding_attention", "full_attention", "sliding_attention"], 3),
        "sliding_window": rng.choice(WINDOWS),
        "head_dim": rng.choice([8, 16, 20]),
        "query_pre_attn_scalar": rng.choice([16, 24, 40]),
        "attention_bias": index // 2 % 2 == 0,
        "final_logit_softcapping": rng.choice([0.5, 1.5, 5.0]) if index // 4 % 2 == 0 else None,
        "rope_parameters": {"full_attention": rotary, "sliding_attention": local},
    }


def _gpt_oss(rng: random.Random, index: int) -> Numbers:
    yarn: Numbers = {
        "rope_type": "yarn",
        "factor": rng.choice([2.0, 8.0]),
        "beta_fast": rng.choice([2.0, 32.0]),
        "beta_slow": 1.0,
        "truncate": index % 2 == 0,
        "original_max_position_embeddings": rng.choice([16, 64, 512]),
        "rope_theta": rng.choice([1000.0, 150000.0]),
        **({"attention_factor": 1.25} if index % 3 == 0 else {}),
    }
    return {
        "rope_parameters": yarn,
        "head_dim": rng.choice([8, 16, 20]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "layer_types": ["full_attention", "sliding_attention"] if index % 5 == 4 else None,
        "sliding_window": rng.choice(WINDOWS),
        "attention_bias": index // 2 % 4 != 0,
        "num_local_experts": rng.choice([3, 4, 8, 12]),
        "num_experts_per_tok": rng.choice([1, 2, 3]),
        "swiglu_alpha": rng.choice([1.0, 1.702]),
        "swiglu_limit": rng.choice([0.5, 1.0, 7.0]),
    } | ({"num_hidden_layers": 2} if index % 5 == 4 else {})


@dataclass(frozen=True)
class Draw:
    """How random models of a family are drawn."""

    config_class: Callable[..., Any]
    model_class: type[PreTrainedModel]
    numbers: Callable[[random.Random, int], Numbers]
    """(source of randomness, index) -> fields of the config beside those that all families share."""


DRAWS: dict[str, Draw] = {
    "llama": Draw(LlamaConfig, LlamaForCausalLM, _llama),
    "mistral": Draw(MistralConfig, MistralForCausalLM, _mistral),
    "olmo2": Draw(Olmo2Config, Olmo2ForCausalLM, _olmo2),
    "qwen2": Draw(Qwen2Config, Qwen2ForCausalLM, _qwen2),
    "qwen3": Draw(Qwen3Config, Qwen3ForCausalLM, _qwen3),
    "qwen3_moe": Draw(Qwen3MoeConfig, Qwen3MoeForCausalLM, _qwen3_moe),
    "gemma3_text": Draw(Gemma3TextConfig, Gemma3ForCausalLM, _gemma3),
    "gpt_oss": Draw(GptOssConfig, GptOssForCausalLM, _gpt_oss),
}


def random_case(family: str, seed: int, index: int) -> RandomCase:
    """The `index`-th random config of a family; tying, rope kinds, biases and windows take turns, the rest is drawn."""
    rng, draw = random.Random(derive_seed(family, seed, index)), DRAWS[family]
    num_kv_heads, groups = rng.choice([(1, 1), (1, 3), (2, 2), (3, 3), (2, 1), (1, 4)])
    shared = {
        "vocab_size": rng.choice([61, 96, 128]),
        "hidden_size": num_kv_heads * groups * rng.choice([8, 16] if num_kv_heads * groups > 2 else [24, 32]),
        "intermediate_size": rng.choice([24, 40, 72]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": num_kv_heads * groups,
        "num_key_value_heads": num_kv_heads,
        "head_dim": rng.choice([None, 8, 12, 32]),
        "max_position_embeddings": 1024,
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-3, 1e-2]),
        "tie_word_embeddings": index % 2 == 0,
        "pad_token_id": None,
    }
    numbers = shared | draw.numbers(rng, index)
    config = draw.config_class(**numbers)
    config.architectures = [draw.model_class.__name__]
    as_json = json.loads(config.to_json_string(use_diff=False))
    if index % 5 == 0 and "rope_theta" in as_json["rope_parameters"]:  # as transformers before version 5 wrote it
        rope = as_json.pop("rope_parameters")
        as_json |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if rope["rope_type"] == "default" else rope}
    if numbers.get("layer_types") is None and index % 4 < 3:  # as where the pattern follows from other numbers
        as_json.pop("layer_types", None)
    family_read = family_of(as_json)
    return RandomCase(config, draw.model_class, family_read, family_read.spec_from_config(as_json))


def _rope(rng: random.Random, index: int) -> Numbers:
    theta = {"rope_theta": rng.choice([100.0, 10000.0, 100000.0, 500000.0])}
    if index % 4 == 0:
        return {"rope_type": "default", **theta}
    if index % 4 == 1:
        return {"rope_type": "linear", "factor": rng.choice([1.5, 2.0, 4.0]), **theta}
    original = {"original_max_position_embeddings": rng.choice([16, 64, 512])}
    if index % 4 == 2:
        return {"rope_type": "yarn", "factor": rng.choice([2.0, 4.0]), "beta_fast": 4.0, **original, **theta}
    high = {"high_freq_factor": rng.choice([2.0, 4.0])}
    return {"rope_type": "llama3", "factor": rng.choice([2.0, 8.0]), "low_freq_factor": 1.0, **high, **original, **theta}


def random_model(case: RandomCase, generator: torch.Generator) -> tuple[PreTrainedModel, Decoder]:
    """The reference with random weights everywhere (norms, biases and sinks too, logits of size 1), and ours with the same."""
    case.config._attn_implementation = case.config._experts_implementation = "eager"
    reference = case.model_class(case.config).float().eval()
    randomise(reference, case.spec, generator)
    with torch.device("meta"):
        decoder = Decoder(case.spec)
    weights = case.family.weight_map(case.spec)
    checkpoint = checkpoint_names(reference, {name: tensor.detach() for name, tensor in reference.named_parameters()})
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.items()}
    expected = weights.stored_shapes()
    assert shapes == expected, (
        f"WEIGHT_NAMES and spec give weights that transformers lacks: {sorted(expected.items() - shapes.items())}, and lack "
        f"{sorted(shapes.items() - expected.items())}"
    )
    fill(decoder, weights, MemoryCheckpoint(checkpoint))
    decoder.requires_grad_(True)
    return reference, decoder


def randomise(reference: PreTrainedModel, spec: DecoderSpec, generator: torch.Generator) -> None:
    """Give every parameter random values, around one where a norm multiplies by it."""
    for name, parameter in reference.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values * _spread(name, parameter, spec) + ("norm" in name) * (1.0 - spec.norm_offset)


def checkpoint_names(reference: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names of the reference's parameters -> by the names in a checkpoint, cut and joined as there."""
    found: dict[str, torch.Tensor] = revert_weight_conversion(reference, tensors)
    return found


def _spread(name: str, parameter: torch.Tensor, spec: DecoderSpec) -> float:
    """Standard deviation that keeps activations of size 1."""
    if parameter.dim() == 1 or name.endswith("bias"):
        return 1.0 if name.endswith("sinks") else 0.3
    num_inputs = parameter.shape[1] if spec.family == "gpt_oss" and parameter.dim() == 3 else parameter.shape[-1]
    return float(num_inputs**-0.5) * (0.5 if parameter.shape[0] == spec.vocab_size else 1.0)


def describe(case: RandomCase) -> str:
    """The numbers that tell one case from another."""
    spec = case.spec
    experts = (
        f", {spec.moe.top_k} of {spec.moe.num_experts} experts {spec.moe.weights} in {spec.moe.layers}" if spec.moe else ""
    )
    return (
        f"{spec.family}, {spec.num_layers} layers of {spec.hidden_size}, {spec.num_heads}/{spec.num_kv_heads} heads of "
        f"{spec.head_dim}, windows {sorted({window or 0 for window in spec.windows})}, rope {_kind(spec.rope.scaling)} "
        f"{spec.rope.theta:g}, eps {spec.norm_eps:g}, tied {spec.tied}, biases {spec.qkv_bias}/{spec.mlp_bias}{experts}"
    )


def _kind(scaling: RopeScaling | None) -> str:
    return scaling.kind if scaling else "default"

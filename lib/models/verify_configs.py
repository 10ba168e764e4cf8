"""Random small models of each family, drawn so that every number of the config matters to the logits."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lib.core.seeding import derive_seed
from lib.models.decoder import Decoder
from lib.models.families import family_of
from lib.models.spec import DecoderSpec


@dataclass(frozen=True)
class RandomCase:
    """A drawn config, and how ours reads it."""

    config: Any
    """The config object of transformers."""
    model_class: type[PreTrainedModel]
    spec: DecoderSpec
    """What our family made of the config's JSON."""
    names: dict[str, str]
    """Our parameter name -> name in transformers."""


def llama_case(seed: int, index: int) -> RandomCase:
    """The `index`-th random llama; tying, rope kind and biases take turns, the rest is drawn."""
    rng = random.Random(derive_seed("llama", seed, index))
    num_kv_heads, groups = rng.choice([(1, 1), (1, 3), (2, 2), (3, 3), (2, 1), (1, 4)])
    num_heads = num_kv_heads * groups
    numbers = {
        "vocab_size": rng.choice([61, 96, 128]),
        "hidden_size": num_heads * rng.choice([8, 16]),
        "intermediate_size": rng.choice([24, 40, 72]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": rng.choice([None, 8, 12, 32]),
        "max_position_embeddings": 1024,
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-3, 1e-2]),
        "tie_word_embeddings": index % 2 == 0,
        "attention_bias": index // 2 % 2 == 0,
        "mlp_bias": index // 4 % 2 == 0,
    }
    theta = rng.choice([100.0, 10000.0, 100000.0, 500000.0])
    config = LlamaConfig(**numbers, rope_parameters={"rope_theta": theta, **_rope(rng, index)})
    config.architectures = ["LlamaForCausalLM"]
    as_json = json.loads(config.to_json_string(use_diff=False))
    if index % 5 == 0:  # as transformers before version 5 wrote it
        rope = as_json.pop("rope_parameters")
        as_json |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if rope["rope_type"] == "default" else rope}
    family = family_of(as_json)
    spec = family.spec_from_config(as_json)
    return RandomCase(config, LlamaForCausalLM, spec, family.hf_names(spec))


def _rope(rng: random.Random, index: int) -> dict[str, Any]:
    if index % 3 == 0:
        return {"rope_type": "default"}
    if index % 3 == 1:
        return {"rope_type": "linear", "factor": rng.choice([1.5, 2.0, 4.0])}
    return {
        "rope_type": "llama3",
        "factor": rng.choice([2.0, 8.0]),
        "low_freq_factor": 1.0,
        "high_freq_factor": rng.choice([2.0, 4.0]),
        "original_max_position_embeddings": rng.choice([16, 64, 512]),
    }


RANDOM_CONFIGS: dict[str, Callable[[int, int], RandomCase]] = {"llama": llama_case}
"""Family -> (seed, index) -> case."""


def random_model(case: RandomCase, generator: torch.Generator) -> tuple[PreTrainedModel, Decoder]:
    """The reference with random weights everywhere (norms and biases too, logits of size 1), and ours with the same."""
    case.config._attn_implementation = "eager"
    reference = case.model_class(case.config).float().eval()
    for name, parameter in reference.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        scale = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        scale *= 0.5 if parameter.shape[0] == case.spec.vocab_size else 1.0
        parameter.data = values * scale + ("norm" in name)
    with torch.device("meta"):
        decoder = Decoder(case.spec)
    weights = dict(reference.named_parameters())
    assert set(case.names.values()) == set(weights), f"weight names differ: {set(case.names.values()) ^ set(weights)}"
    decoder.load_state_dict({ours: weights[theirs].detach().clone() for ours, theirs in case.names.items()}, assign=True)
    decoder.requires_grad_(True)
    return reference, decoder


def describe(case: RandomCase) -> str:
    """The numbers that tell one case from another."""
    spec = case.spec
    rope = spec.rope_scaling.kind if spec.rope_scaling else "default"
    return (
        f"{spec.family}, {spec.num_layers} layers of {spec.hidden_size}, {spec.num_heads}/{spec.num_kv_heads} heads of "
        f"{spec.head_dim}, rope {rope} {spec.rope_theta:g}, eps {spec.norm_eps:g}, tied {spec.tied}, "
        f"biases {spec.attention_bias}/{spec.mlp_bias}"
    )

"""A small random checkpoint of each family, with a tokenizer, as transformers writes it."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from lib.models.families import family_of
from lib.models.verify_configs import DRAWS, randomise
from tests.tiny import VOCAB_SIZE, tiny_tokenizer

_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_EXPERTS = {"num_experts_per_tok": 2}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": _DEFAULT_ROPE},
    "mistral": {"sliding_window": 8, "rope_parameters": _DEFAULT_ROPE},
    "olmo2": {"rope_parameters": _DEFAULT_ROPE},
    "qwen2": {"rope_parameters": _DEFAULT_ROPE},
    "qwen3": {"rope_parameters": _DEFAULT_ROPE},
    "qwen3_moe": {"rope_parameters": _DEFAULT_ROPE, "num_experts": 12, "moe_intermediate_size": 32, **_EXPERTS},
    "gemma3_text": {
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "final_logit_softcapping": 5.0,
        "rope_parameters": {"full_attention": {**_DEFAULT_ROPE, "rope_theta": 1e6}, "sliding_attention": _DEFAULT_ROPE},
    },
    "gpt_oss": {
        "num_local_experts": 12,
        "sliding_window": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "rope_theta": 150000.0,
            "truncate": False,
        },
        **_EXPERTS,
    },
}


def family_model(
    folder: Path, family: str, *, seed: int = 0, dtype: str = "bfloat16", max_shard_size: str = "5GB", **overrides: Any
) -> Path:
    """Write a random model (2 layers, 7 for gemma3; grouped heads) of a family and return the folder.

    `overrides` are fields of the family's config; the same arguments give the same bytes.
    """
    numbers: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    tiny_tokenizer(folder)
    draw = DRAWS[family]
    config = draw.config_class(**(numbers | _OF_FAMILY[family] | overrides))
    config.architectures = [draw.model_class.__name__]
    as_json = json.loads(config.to_json_string(use_diff=False))
    with torch.random.fork_rng(devices=[]):
        model = draw.model_class(config)
    randomise(model, family_of(as_json).spec_from_config(as_json), torch.Generator().manual_seed(seed))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=None)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder

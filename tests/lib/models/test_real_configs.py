"""The configs of published models are read as they are, and what a family doesn't compute is refused."""

from typing import Any

import pytest

from lib.core.errors import ModelError
from lib.models.families import family_of
from lib.models.spec import DecoderSpec, Rope

QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
GEMMA_3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
    ],
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


def spec_of(config: dict[str, Any], **changes: Any) -> DecoderSpec:
    changed = {key: value for key, value in (config | changes).items() if value != "absent"}
    return family_of(changed).spec_from_config(changed)


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        (QWEN3_0_6B, 596_049_920),
        (QWEN3_30B_A3B, 30_532_122_624),
        (MISTRAL_7B, 7_241_732_096),
        (GEMMA_3_1B, 999_885_952),
        (GPT_OSS_20B, 20_914_757_184),
    ],
)
def test_published_models_have_their_published_size(config: dict[str, Any], num_parameters: int) -> None:
    """[D8] The numbers of parameters that the Hub states for these models."""
    assert spec_of(config).num_parameters == num_parameters


def test_windows_and_rotary_positions_are_where_they_belong() -> None:
    """[B6] Gemma: five layers of 512 keys with base 10,000, then one of all with 1,000,000. gpt-oss: 128 and all.
    Mistral: 4,096 in all layers, which is also what no word of it means; null means none."""
    gemma, oss = spec_of(GEMMA_3_1B), spec_of(GPT_OSS_20B)
    assert [layer for layer in range(26) if gemma.window(layer) is None] == [5, 11, 17, 23]
    assert set(gemma.windows) == {512, None} and (gemma.rope, gemma.local_rope) == (Rope(1e6), Rope(1e4))
    assert gemma.tied, "the default of the family, where the config doesn't say"
    assert oss.windows == (128, None) * 12 and spec_of(GPT_OSS_20B, layer_types="absent") == oss
    assert oss.rope.scaling is not None and oss.rope.scaling.magnitude == pytest.approx(1.3465735902799727)
    assert spec_of(MISTRAL_7B).windows == spec_of(MISTRAL_7B, sliding_window="absent").windows == (4096,) * 32
    assert set(spec_of(MISTRAL_7B, sliding_window=None).windows) == {None}, "as versions 0.2 and later have it"
    assert spec_of(QWEN3_0_6B, use_sliding_window=True, sliding_window=64, max_window_layers=26).windows[25:] == (None, 64, 64)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (GEMMA_3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA_3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA_3_1B, {"hidden_activation": "gelu"}, "hidden_activation"),
        (GEMMA_3_1B, {"layer_types": ["sliding_attention"]}, "expected 26 of"),
        (GEMMA_3_1B, {"layer_types": ["chunked_attention"] * 26}, "layer_types"),
        (GEMMA_3_1B, {"rope_parameters": {"rope_type": "default"}}, "one mapping for sliding_attention"),
        (GEMMA_3_1B, {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "rope_theta 1000000 contradicts"),
        (GEMMA_3_1B, {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}}, "rope_local_base_freq 10000 contradicts"),
        (MISTRAL_7B, {"layer_types": ["full_attention"] * 32}, "unknown key"),
        (MISTRAL_7B, {"sliding_window": 0}, "sliding_window is 0"),
        (GPT_OSS_20B, {"rope_scaling": None}, "yarn numbers"),
        (GPT_OSS_20B, {"experts_per_token": 2}, "contradict each other"),
        (GPT_OSS_20B, {"initial_context_length": 8192}, "contradict each other"),
        (GPT_OSS_20B, {"num_experts_per_tok": 33, "experts_per_token": 33}, "above the number of experts"),
        (GPT_OSS_20B, {"swiglu_limit": 0}, "swiglu_limit"),
        (GPT_OSS_20B, {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
        (QWEN3_30B_A3B, {"mlp_only_layers": [48]}, "mlp_only_layers"),
        (QWEN3_30B_A3B, {"num_local_experts": 64}, "contradict each other"),
        (QWEN3_30B_A3B, {"norm_topk_prob": "yes"}, "norm_topk_prob"),
        (QWEN3_30B_A3B, {"shared_expert_intermediate_size": 5}, "unknown key"),
        (QWEN3_0_6B, {"layer_types": ["sliding_attention"] * 28}, "sliding_window is not set"),
        (QWEN3_0_6B, {"max_window_layers": -1}, "max_window_layers"),
        (QWEN3_0_6B, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    ],
)
def test_what_is_not_computed_is_refused(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    """[D8] Never ignored, and never one of two numbers that contradict each other."""
    with pytest.raises(ModelError, match=message):
        spec_of(config, **changes)

"""A GGUF file of the llama family becomes a plain Hugging Face folder: dequantised weights, tokenizer, chat template.

Source of the layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's converter, which stores
the query and key rows of each head in interleaved rotary order; they are put back here.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lib.core.errors import ModelError

_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_CONTROL_TOKEN, _USER_TOKEN = 3, 4


def _smollm() -> Any:
    """Each digit is a token of its own; the rest as in GPT-2."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {"smollm": _smollm}
"""`tokenizer.ggml.pre` -> the split that goes before the merges. A GGUF names it and does not hold it."""


def import_gguf(gguf_file: Path, out: Path) -> None:
    """Write config, generation config, tokenizer and bfloat16 weights to the existing folder `out`.

    The bytes depend on the GGUF file alone. Padding gets a token that no conversation trains on.

    Raises:
        ModelError: not a GGUF file, another architecture, or a tensor, split or token type this import doesn't know.
    """
    try:
        reader = GGUFReader(gguf_file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{gguf_file}: not a readable GGUF file ({error}); fetch it again") from error
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ModelError(f"{gguf_file}: architecture {fields.get('general.architecture')!r}; this import reads 'llama' only")
    weights = _weights(reader, fields, gguf_file)
    tokenizer, pad_id = _write_tokenizer(fields, out, gguf_file)
    config = _config(fields, tied="lm_head.weight" not in weights, pad_id=pad_id)
    if config["vocab_size"] != tokenizer.get_vocab_size():
        raise ModelError(f"{gguf_file}: {config['vocab_size']} embeddings, {tokenizer.get_vocab_size()} tokens")
    _write_json(out / "config.json", config)
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(out / "generation_config.json", token_ids)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def _config(fields: dict[str, Any], *, tied: bool, pad_id: int) -> dict[str, Any]:
    """The Hugging Face config.json of a llama-family GGUF."""
    num_heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "head_dim": fields.get("llama.rope.dimension_count", fields["llama.embedding_length"] // num_heads),
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", num_heads),
        "pad_token_id": pad_id,
        # A GGUF holds the epsilon as float32 (1e-5 reads as 9.999999747378752e-06); the config says the decimal.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": fields.get("llama.vocab_size", len(fields["tokenizer.ggml.tokens"])),
    }


def _weights(reader: GGUFReader, fields: dict[str, Any], gguf_file: Path) -> dict[str, torch.Tensor]:
    """Hugging Face name -> bfloat16 tensor, sorted by name."""
    num_heads = fields["llama.attention.head_count"]
    heads_of = {"attn_q": num_heads, "attn_k": fields.get("llama.attention.head_count_kv", num_heads)}
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            raise ModelError(f"{gguf_file}: scaled rotary frequencies (rope_freqs) are not supported")
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        in_layer = _LAYER_TENSOR.fullmatch(tensor.name)
        if in_layer and in_layer[2] in _LAYER_NAMES:
            name = f"model.layers.{in_layer[1]}.{_LAYER_NAMES[in_layer[2]]}.weight"
            if in_layer[2] in heads_of:
                values = _rotary_halves(values, heads_of[in_layer[2]])
        elif tensor.name in _OUTER_NAMES:
            name = _OUTER_NAMES[tensor.name]
        else:
            raise ModelError(f"{gguf_file}: tensor {tensor.name!r} is not one of the llama family's")
        weights[name] = values.to(torch.bfloat16).contiguous()
    return dict(sorted(weights.items()))


def _rotary_halves(rows_OD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[O, D] rows of each head from interleaved pairs (0,1)(2,3).. to two halves, as Hugging Face's rotary takes them."""
    num_rows, width = rows_OD.shape
    pairs = rows_OD.view(num_heads, num_rows // num_heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(num_rows, width)


def _write_tokenizer(fields: dict[str, Any], out: Path, gguf_file: Path) -> tuple[Tokenizer, int]:
    """Write tokenizer.json, tokenizer_config.json and the chat template; returns the tokenizer and the padding id."""
    split = fields.get("tokenizer.ggml.pre")
    if fields.get("tokenizer.ggml.model") != "gpt2" or split not in PRE_TOKENIZERS:
        kind = (fields.get("tokenizer.ggml.model"), split)
        raise ModelError(f"{gguf_file}: tokenizer {kind}; known are gpt2 with one of {sorted(PRE_TOKENIZERS)}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    control: list[str] = []
    for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True):
        if kind == _CONTROL_TOKEN:
            control.append(token)
        if kind in {_CONTROL_TOKEN, _USER_TOKEN}:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL_TOKEN)])
    tokenizer.save(str(out / "tokenizer.json"))
    bos, eos = (tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos"))
    pad = _padding_token(control, {bos, eos}, gguf_file)
    config = {
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        "bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": fields["llama.context_length"],
        "pad_token": pad,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if config["add_bos_token"]:
        raise ModelError(f"{gguf_file}: puts {bos!r} before every text, which this import doesn't write")
    template = fields.get("tokenizer.chat_template")
    if not template:
        raise ModelError(f"{gguf_file}: has no chat template; take an instruction-tuned model")
    _write_json(out / "tokenizer_config.json", {**config, "chat_template": template})
    return tokenizer, tokens.index(pad)


def _padding_token(control: list[str], taken: set[str], gguf_file: Path) -> str:
    """A control token that is neither begin nor end of a turn, so that no supervised id equals padding."""
    free = [token for token in control if token not in taken]
    if not free:
        raise ModelError(f"{gguf_file}: no control token is left for padding")
    return "<|endoftext|>" if "<|endoftext|>" in free else free[0]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

"""A GGUF import gives back the weights and tokens that went in; transformers' own GGUF reader is the second opinion."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lib.core.errors import ModelError
from lib.models.gguf_import import import_gguf
from lib.models.import_check import check_begin_token
from lib.tokens.tokenizer import Tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "12"]
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rope_theta=50000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)


def random_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).mul(0.3).to(torch.bfloat16))
    return model


def interleaved(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows (convert_hf_to_gguf.py, `LlamaModel.permute`)."""
    return rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, *, quantised: bool = False, **changes: Any) -> Path:
    """A GGUF file as llama.cpp's converter lays it out; `changes` replace metadata (None leaves it out)."""
    facts = {"architecture": "llama", "pre": "smollm", "kind": "gpt2", "template": TEMPLATE, "bos": False, **changes}
    writer = gguf.GGUFWriter(path, facts["architecture"])
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model(facts["kind"])
    writer.add_tokenizer_pre(facts["pre"])
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)))
    writer.add_token_merges(["h e", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(facts["bos"])
    if facts["template"]:
        writer.add_chat_template(facts["template"])
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
    parts |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"model.layers.{i}.{hf}.weight": f"blk.{i}.{ggml}.weight" for i in range(2) for hf, ggml in parts.items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = interleaved(values, 4 if "q_proj" in name else 2)
        if quantised and values.ndim == 2:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(names[name], packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(names[name], values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return random_model()


def imported(gguf_file: Path, out: Path) -> Path:
    out.mkdir()
    import_gguf(gguf_file, out)
    return out


def test_weights_come_back_to_the_bit_and_logits_with_them(tmp_path: Path, model: LlamaForCausalLM) -> None:
    """The values are bfloat16 numbers stored as float32, so nothing may be rounded."""
    folder = imported(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = torch.randint(0, len(TOKENS), (2, 17), generator=torch.Generator().manual_seed(1))
    assert torch.equal(found(token_ids).logits, model(token_ids).logits)
    assert found.config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_quantised_weights_are_those_that_transformers_reads(tmp_path: Path, model: LlamaForCausalLM) -> None:
    write_gguf(tmp_path / "m.gguf", model, quantised=True)
    folder = imported(tmp_path / "m.gguf", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, theirs[name].to(torch.bfloat16)), name


def test_each_digit_is_a_token_and_declared_tokens_have_their_roles(tmp_path: Path, model: LlamaForCausalLM) -> None:
    """The merge "1 2" exists, but the split of this tokenizer keeps digits apart; "h e" merges."""
    folder = imported(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("he 12") == ["he", "Ġ", "1", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.encode("<|im_end|>x") == [2, TOKENS.index("x")]
    Tokenizer.load(folder)
    check_begin_token(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_the_same_file_gives_the_same_bytes(tmp_path: Path, model: LlamaForCausalLM) -> None:
    write_gguf(tmp_path / "m.gguf", model)
    one, two = imported(tmp_path / "m.gguf", tmp_path / "one"), imported(tmp_path / "m.gguf", tmp_path / "two")
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"pre": "llama-bpe"}, "llama-bpe"),
        ({"kind": "llama"}, "'llama', 'smollm'"),
        ({"template": None}, "no chat template"),
        ({"bos": True}, "before every text"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, model: LlamaForCausalLM, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        imported(write_gguf(tmp_path / "m.gguf", model, **changes), tmp_path / "out")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="not a readable GGUF"):
        imported(tmp_path / "m.gguf", tmp_path / "out")

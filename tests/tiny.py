"""Tiny real assets for tests, made from scratch in milliseconds: no download, the same bytes every time."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2-Instruct's template, with its default system message."""
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2."""
VOCAB_SIZE = 384

_CORPUS = (
    "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\n",
    "user\nWhat is the sum of 12 and 30? State the final answer of the following problem.\n",
    "assistant\nThe answer is 42. The sum of the numbers is the answer that was asked for.\n",
    "Compute the product or the difference, then write down only what remains when every step has been checked.\n",
)


def tiny_tokenizer(folder: Path, *, template: str = CHATML_TEMPLATE, pad_token: str = "<|im_end|>") -> Path:
    """Write a byte-level BPE tokenizer (VOCAB_SIZE ids, ChatML) as a Hugging Face folder and return the folder.

    Like SmolLM2: digits are single tokens, bos is <|im_start|>, and pad is the same token as eos (<|im_end|>).
    """
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": pad_token}
    settings = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1, sort_keys=True), encoding="utf-8")
    return folder


def tiny_model(folder: Path, *, seed: int = 0, dtype: str = "bfloat16", max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """Write a random Llama (2 layers, grouped heads, tied, the tiny tokenizer's vocabulary) as a Hugging Face folder.

    All weights are random, norms and biases too. `overrides` are fields of LlamaConfig; the same arguments give the same bytes.
    """
    numbers: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    tiny_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(numbers | overrides)))
        for name, parameter in model.named_parameters():
            spread = torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
            parameter.data = spread + 1.0 if "norm" in name else spread
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder

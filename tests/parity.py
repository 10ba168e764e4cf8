"""`python -m tests.parity`: training ids against serving ids, for the real tokenizers, on fuzzed strings and conversations.

Strings are encoded whole and, as training does it, from the ids of their words.

Serving is vLLM's own path without an engine: its tokenizer loader and chat renderer for a model folder; for gpt-oss its
harmony entry point. Prints one JSON object: what was compared and how much differs.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib.core.examples import Conversation
from lib.rollout.engine import engine_environment
from tests.lib.tokens.formats import DATE, Format, as_dicts, forget, formats, tools_of

TEMPLATES = ("chatml", "qwen3", "gemma3")
NAMES = (*TEMPLATES, "harmony")
_ALPHABETS = (
    "abcdefghij klmnop ",
    "0123456789.,+-*/= ",
    "\n\r\t \x0b\x0c\u00a0\u2028\u3000",
    "éüñçøß日本語中文한국어рускийعربيةעבריתहिन्दी",
    "😀👩🏽‍🚀🇫🇷❤️\u200d\ufe0f",
    "\u202e\u2066\u2069\u200f\ufeff\u0000\u0001\u007f\ufffd",
    "e\u0301a\u0308\u1100\u1161\u11a8",
    "<|im_start>{}[]()\"'`\\/_▁Ġ",
)


def fuzzed(number: int) -> str:
    """A random string: emoji, NUL, text that runs both ways, composed and not; every thousandth is one line of 1 MB."""
    source = random.Random(f"fuzz {number}")
    length = 1_000_000 if number % 5000 == 17 else source.choice((1, 3, 10, 40, 200))
    alphabet = "".join(source.sample(_ALPHABETS, source.randint(1, 4)))
    return "".join(source.choices(alphabet, k=length))


def serving(form: Format, scratch: Path) -> tuple[Any, Callable[[Conversation], list[int]]]:
    """(vLLM's tokenizer, the ids that vLLM feeds a model for a conversation's prompt)."""
    from vllm.config import ModelConfig, VllmConfig  # noqa: PLC0415 - takes half a minute; the help needs none of it
    from vllm.renderers.params import ChatParams, TokenizeParams  # noqa: PLC0415
    from vllm.renderers.registry import renderer_from_config  # noqa: PLC0415

    folder = model_folder(form, scratch / form.name)
    config = VllmConfig(
        model_config=ModelConfig(model=str(folder), tokenizer=str(folder), dtype="float32", max_model_len=1 << 16)
    )
    renderer = renderer_from_config(config)

    def ids(row: Conversation) -> list[int]:
        extra = {"tools": tools_of(row), "add_generation_prompt": True, "tokenize": False}
        params = ChatParams(chat_template_kwargs=extra)
        _, prompts = renderer.render_chat(
            [for_vllm(row)], params, TokenizeParams(max_total_tokens=None, add_special_tokens=False)
        )
        return list(prompts[0]["prompt_token_ids"])

    return renderer.get_tokenizer(), (harmony_ids if form.name == "harmony" else ids)


def model_folder(form: Format, folder: Path) -> Path:
    """The format's tokenizer beside the config of a small model with as many ids: all that vLLM's renderer reads."""
    form.encoder.tokenizer.save(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": form.encoder.tokenizer.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1 << 16,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def harmony_ids(row: Conversation) -> list[int]:
    """A prompt as vLLM's chat endpoint makes it for gpt-oss."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam  # noqa: PLC0415
    from vllm.entrypoints.openai.parser import harmony_utils  # noqa: PLC0415

    tools = [ChatCompletionToolsParam(**tool) for tool in tools_of(row) or []] or None
    instructions, rest = harmony_utils.extract_instructions_from_messages(for_vllm(row))
    messages = harmony_utils.build_harmony_preamble(instructions=instructions, tools=tools, with_custom_tools=bool(tools))
    messages += harmony_utils.parse_chat_inputs_to_harmony_messages(rest)
    return list(harmony_utils.render_for_completion(messages))


def for_vllm(row: Conversation) -> list[dict[str, Any]]:
    """Messages as a client sends them: the arguments of calls are text, each call has an id that its result names."""
    found = as_dicts(row)
    for number, message in enumerate(found):
        if "reasoning_content" in message:
            message["reasoning"] = message["reasoning_content"]
        for call in message.get("tool_calls", []):
            call["id"] = f"call-{number}"
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        if message["role"] == "tool":
            message["tool_call_id"] = f"call-{number - 1}"
    return found


def prompt_of(row: Conversation) -> Conversation:
    """The conversation up to its last answer."""
    return replace(row, messages=row.messages[:-1])


def compare(form: Format, num_strings: int, num_conversations: int, scratch: Path) -> dict[str, int]:
    """Ids of strings (AutoTokenizer's, ours, vLLM's) and of prompts (ours, vLLM's)."""
    tokenizer, served = serving(form, scratch)
    differ = {"strings_differ": 0, "strings_from_words_differ": 0, "prompts_differ": 0, "round_trips_lost": 0}
    own = form.encoder.tokenizer
    composed = form.name != "qwen3"  # which writes text in composed form (NFC)
    for number in tqdm(range(num_strings), desc=f"{form.name} strings", mininterval=5):
        text = fuzzed(number)
        ids = own.encode(text)
        theirs = [list(each(text, add_special_tokens=False)["input_ids"]) for each in (form.auto, tokenizer)]
        differ["strings_differ"] += any(ids != other for other in theirs)
        if own.control_text.first(text) is None:
            differ["strings_from_words_differ"] += own.encode_texts([text]) != [ids]
        differ["round_trips_lost"] += composed and "▁" not in text and own.decode(ids) != text
    for number in tqdm(range(num_conversations), desc=f"{form.name} prompts", mininterval=5):
        row = prompt_of(form.conversation(number))
        ours = form.encoder.prompt_ids(row.messages, row.tools, source=row.source, sample_id=row.sample_id)
        differ["prompts_differ"] += ours != served(row)
    return {"strings": num_strings, "prompts": num_conversations, **differ}


def main() -> int:
    """0 when nothing differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("--strings", type=int, default=10_000, help="fuzzed strings for each tokenizer")
    parser.add_argument("--conversations", type=int, default=200, help="rendered prompts for each tokenizer")
    parser.add_argument("--formats", nargs="*", default=list(NAMES), help="names of formats")
    options = parser.parse_args()
    os.environ.update(engine_environment() | {"VLLM_SYSTEM_START_DATE": DATE, "HF_HUB_OFFLINE": "1"})
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for form in formats(Path(scratch)):
            if form.name in options.formats:
                found[form.name] = compare(form, options.strings, options.conversations, Path(scratch))
                forget()
    sys.stdout.write(json.dumps({"date": DATE, "parity": found}) + "\n")
    return int(any(value for result in found.values() for name, value in result.items() if "differ" in name or "lost" in name))


if __name__ == "__main__":
    sys.exit(main())

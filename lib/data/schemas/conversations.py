"""Rows that become conversations: OpenAI messages, ShareGPT, Alpaca, and a prompt with its completion as messages."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lib.core.examples import Conversation, Message
from lib.data.checks import (
    RowRefused,
    check_answer,
    check_id,
    check_known,
    check_list,
    check_object,
    check_text,
    parse_json,
    shown,
)
from lib.data.schemas.labels import check_labels
from lib.data.schemas.messages import check_call, check_calls_offered, check_messages, check_order, check_tools

Row = Mapping[str, Any]

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def from_messages(row: Row, source: str) -> Conversation:
    """`messages`, and if need be `tools`, `answer` and `id`."""
    return _conversation(row, source, check_messages(row["messages"]))


def from_sharegpt(row: Row, source: str) -> Conversation:
    """`conversations` of `from` and `value`, and if need be `system`, `tools`, `answer` and `id`."""
    turns = check_list(row["conversations"], "conversations", "a list of at least one human and one gpt message")
    messages = [_sharegpt_message(turn, f"message {number}") for number, turn in enumerate(turns, start=1)]
    return _conversation(row, source, (*_system(row), *messages))


def from_alpaca(row: Row, source: str) -> Conversation:
    """`instruction` and `output`, and if need be `input`, `system`, `history`, `answer` and `id`.

    The user's text is the instruction, and where there is an input, a blank line and the input.
    """
    question = check_text(row["instruction"], "instruction")
    if row.get("input") not in (None, ""):
        question += "\n\n" + check_text(row["input"], "input")
    earlier: list[Message] = []
    history = row.get("history")
    for number, pair in enumerate(
        check_list(history, "history", "a list of pairs") if history not in (None, []) else [], start=1
    ):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowRefused(f"history {number} is {shown(pair)}, expected [question, answer]")
        earlier.append(Message("user", check_text(pair[0], f"history {number}: question")))
        earlier.append(Message("assistant", check_text(pair[1], f"history {number}: answer")))
    answer = Message("assistant", check_text(row["output"], "output"))
    return _conversation(row, source, (*_system(row), *earlier, Message("user", question), answer))


def from_completion_messages(row: Row, source: str) -> Conversation:
    """`prompt` and `completion` as lists of messages: only the completion's turns are trained."""
    prompt = check_messages(row["prompt"], "prompt")
    completion = check_messages(row["completion"], "completion", first=len(prompt) + 1)
    if completion[0].role != "assistant":
        raise RowRefused(f"completion begins with a message of the {completion[0].role}; it must be the assistant's")
    untrained = [
        replace(message, weight=0.0) if message.role == "assistant" and message.weight is None else message
        for message in prompt
    ]
    return _conversation(row, source, (*untrained, *completion))


def _conversation(row: Row, source: str, messages: tuple[Message, ...]) -> Conversation:
    check_order(messages)
    tools = check_tools(row.get("tools"))
    check_calls_offered(messages, tools)
    return Conversation(check_id(row, source), messages, source, check_answer(row), tools, check_labels(row))


def _system(row: Row) -> list[Message]:
    """The system message of a column that may be empty."""
    return [] if row.get("system") in (None, "") else [Message("system", check_text(row["system"], "system"))]


def _sharegpt_message(value: object, where: str) -> Message:
    turn = check_object(value, where, '{"from": ..., "value": ...}')
    for key in ("from", "value"):
        if key not in turn:
            raise RowRefused(f"{where} has no {key!r}")
    check_known(turn.keys(), ("from", "value"), where, "a message has from and value only")
    if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
        raise RowRefused(f"{where} is from {shown(turn['from'])}; expected one of {', '.join(SHAREGPT_ROLES)}")
    role = SHAREGPT_ROLES[turn["from"]]
    text = check_text(turn["value"], f"{where} ({turn['from']}): value", blank=role == "tool")
    if turn["from"] != "function_call":
        return Message(role, text)  # type: ignore[arg-type]  # a role by its table
    found = parse_json(text, f"{where} (function_call): value")
    calls = found if isinstance(found, list) and found else [found]
    return Message("assistant", "", tool_calls=tuple(check_call(call, f"{where}: call {n}") for n, call in enumerate(calls, 1)))

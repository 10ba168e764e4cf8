"""Lists of messages in OpenAI's form: each message on its own, and the order they come in."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast, get_args

from lib.core.examples import Message, Role, ToolCall
from lib.data.checks import (
    RowRefused,
    check_known,
    check_list,
    check_number,
    check_object,
    check_text,
    json_text,
    parse_json,
    shown,
)

ROLES: tuple[str, ...] = get_args(Role)
KEYS = ("role", "content", "thinking", "reasoning_content", "tool_calls", "weight", "name", "tool_call_id")
_KEYS_OF: dict[str, tuple[str, ...]] = {
    "assistant": ("thinking", "reasoning_content", "tool_calls", "weight"),
    "tool": ("name", "tool_call_id"),
}
"""Beside role and content. A key of another role may be there if it is null or an empty list: tables have all columns."""

_NEXT = {"user": "assistant", "assistant": "user", "tool": "assistant"}


def check_messages(value: object, what: str = "messages", first: int = 1) -> tuple[Message, ...]:
    """The messages of a list, each on its own; `first` is the number of the first one in reasons."""
    found = check_list(value, what, "a list of at least one user and one assistant message")
    return tuple(
        _plain_message(message) or check_message(message, f"message {number}") for number, message in enumerate(found, first)
    )


def _plain_message(value: object) -> Message | None:
    """The short way for what nearly all messages are: a role and a text, both as they should be."""
    if not isinstance(value, dict) or len(value) != 2:
        return None
    role, content = value.get("role"), value.get("content")
    if role not in ROLES or not isinstance(content, str) or not content or content.isspace():
        return None
    return Message(role, content) if content.isascii() or _is_utf8(content) else None


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_message(value: object, where: str) -> Message:
    message = check_object(value, where, '{"role": ..., "content": ...}')
    for key in ("role", "content"):
        if key not in message:
            raise RowRefused(f"{where} has no {key!r}")
    check_known(message.keys(), KEYS, where, f"a message may have {', '.join(KEYS)}")
    role = message["role"]
    if role not in ROLES:
        raise RowRefused(f"{where} has role {shown(role)}; expected one of {', '.join(ROLES)}")
    for key in KEYS[2:]:
        if key not in _KEYS_OF.get(role, ()) and not _is_absent(message.get(key)):
            raise RowRefused(f"{where} has {key!r}, which a message of role {role} can't have; remove it")
    calls = _check_calls(message.get("tool_calls"), where)
    content = message["content"]
    if content is None and calls:
        content = ""  # OpenAI's form of a turn that only calls tools
    return Message(
        cast(Role, role),
        check_text(content, f"{where} ({role}): content", blank=bool(calls) or role == "tool"),
        thinking=_check_thinking(message, where),
        tool_calls=calls,
        name=_check_optional(message, "name", where),
        call_id=_check_optional(message, "tool_call_id", where),
        weight=_check_weight(message.get("weight"), where),
    )


def check_call(value: object, where: str) -> ToolCall:
    """`{"type": "function", "function": {"name", "arguments"}, "id"?}` or the inner object alone."""
    given = check_object(value, where, '{"function": {"name": ..., "arguments": ...}}')
    call = {key: item for key, item in given.items() if item is not None}  # tables have the keys of all rows
    if "function" in call:
        check_known(call.keys(), ("id", "type", "function", "index"), where, "a call has id, type and function")
        if call.get("type") not in (None, "function"):
            raise RowRefused(f"{where} has type {shown(call['type'])}; only functions can be called")
        function = check_object(call["function"], f"{where}: function", '{"name": ..., "arguments": ...}')
    else:
        function = {key: item for key, item in call.items() if key != "id"}
    check_known(function.keys(), ("name", "arguments"), where, "a function that is called has name and arguments")
    if function.get("arguments") is None:
        raise RowRefused(f"{where}: arguments is missing or null")
    arguments = json_text(function["arguments"], f"{where}: arguments")
    if not isinstance(parse_json(arguments, f"{where}: arguments"), Mapping):
        raise RowRefused(f"{where}: arguments is {shown(arguments)}, expected an object of arguments by name")
    call_id = call.get("id")
    return ToolCall(
        check_text(function.get("name"), f"{where}: name"),
        arguments,
        None if call_id is None else check_text(call_id, f"{where}: id"),
    )


def check_tools(value: object) -> tuple[str, ...]:
    """Functions offered, as a list of OpenAI's objects or as that list in a JSON text; each one's JSON."""
    if _is_absent(value):
        return ()
    if isinstance(value, str):
        # What JSON text says is meant, nulls as well.
        tools = [json.dumps(tool, ensure_ascii=False) for tool in _parsed_list(value)]
    else:
        found = check_list(value, "tools", "a list of functions")
        tools = [json_text(tool, f"tool {number}") for number, tool in enumerate(found, start=1)]
    names = [tool_name(tool, f"tool {number}") for number, tool in enumerate(tools, start=1)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RowRefused(f"tools has two functions of the name {twice!r}; name each once")
    return tuple(tools)


def tool_name(tool: str, where: str) -> str:
    """The name in a tool's JSON."""
    value = check_object(parse_json(tool, where), where, '{"type": "function", "function": {"name": ...}}')
    function = check_object(value.get("function", value), f"{where}: function", '{"name": ...}')
    return check_text(function.get("name"), f"{where}: name")


def check_order(messages: Sequence[Message]) -> None:
    """[system] user turn [user turn ...], a turn being assistant [results assistant ...]: what every template takes.

    Raises:
        RowRefused: another order, a call without its result or the reverse, or no assistant's message at the end.
    """
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise RowRefused("has no assistant message, so nothing to learn from")
    _next_role(messages)
    if roles[-1] != "assistant":
        raise RowRefused(f"ends with a message of the {roles[-1]}; the last one must be the assistant's")


def check_prompt_order(messages: Sequence[Message], what: str) -> None:
    """As `check_order`, up to where the assistant is to speak."""
    if _next_role(messages) != "assistant":
        raise RowRefused(f"{what} ends with a message of the {messages[-1].role}; it must end where the assistant is to speak")


def _next_role(messages: Sequence[Message]) -> str:
    """Whose message has to come after these."""
    expected = "user"
    open_calls: list[ToolCall] = []
    for number, message in enumerate(messages, start=1):
        if number == 1 and message.role in ("system", "developer"):
            continue
        if message.role != expected:
            wanted = f"the result of the call of {open_calls[0].name!r}" if open_calls else f"of the {expected}"
            raise RowRefused(
                f"message {number} is of the {message.role}, expected {wanted}; after an optional first system message, user "
                "and assistant take turns, and every call of a tool is followed by its result"
            )
        if expected == "tool":
            _answer(open_calls, message, number)
        else:
            open_calls = list(message.tool_calls)
            if open_calls:
                _check_call_ids(open_calls, number)
        expected = "tool" if open_calls else _NEXT[message.role]
    return expected


def _check_call_ids(calls: list[ToolCall], number: int) -> None:
    ids = [call.call_id for call in calls]
    if len({call_id is None for call_id in ids}) > 1:
        raise RowRefused(f"message {number} has calls with an id and calls without one; give each call one, or none")
    if None not in ids and len(set(ids)) != len(ids):
        raise RowRefused(f"message {number} has two calls of the same id; give each its own")


def _answer(open_calls: list[ToolCall], result: Message, number: int) -> None:
    """Take the call that a result answers off the list: by id, or the first one where calls have no ids."""
    if result.call_id is None and open_calls[0].call_id is not None:
        raise RowRefused(f"message {number} has no tool_call_id, and the calls before it have ids; say which one it answers")
    answered = next((call for call in open_calls if call.call_id == result.call_id), None)
    if answered is None:
        waiting = ", ".join(shown(call.call_id) for call in open_calls)
        raise RowRefused(f"message {number} answers call {shown(result.call_id)}; the calls that wait for a result: {waiting}")
    if result.name is not None and result.name != answered.name:
        raise RowRefused(f"message {number} is a result of {result.name!r}, but the call it answers is of {answered.name!r}")
    open_calls.remove(answered)


def check_calls_offered(messages: Iterable[Message], tools: Sequence[str]) -> None:
    """Where tools are listed, only those are called."""
    if not tools:
        return
    names = {tool_name(tool, "tool") for tool in tools}
    for number, message in enumerate(messages, start=1):
        for call in message.tool_calls:
            if call.name not in names:
                offered = ", ".join(sorted(names))
                raise RowRefused(f"message {number} calls {call.name!r}, which is not among the tools: {offered}")


def _check_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    if _is_absent(value):
        return ()
    calls = check_list(value, f"{where}: tool_calls", "a list of calls")
    return tuple(check_call(call, f"{where}: call {number}") for number, call in enumerate(calls, start=1))


def _check_thinking(message: Mapping[str, Any], where: str) -> str | None:
    given = [key for key in ("thinking", "reasoning_content") if message.get(key) is not None]
    if len(given) > 1:
        raise RowRefused(f"{where} has both thinking and reasoning_content, which are two names of one thing; keep one")
    return check_text(message[given[0]], f"{where}: {given[0]}") if given else None


def _check_weight(value: object, where: str) -> float | None:
    if value is None:
        return None
    weight = check_number(value, f"{where}: weight")
    if weight < 0.0:
        raise RowRefused(f"{where}: weight is {weight}, expected 0 or more")
    return weight


def _check_optional(message: Mapping[str, Any], key: str, where: str) -> str | None:
    return None if message.get(key) is None else check_text(message[key], f"{where}: {key}")


def _parsed_list(text: str) -> list[Any]:
    return check_list(parse_json(text, "tools"), "tools", "a list of functions")


def _is_absent(value: object) -> bool:
    return value is None or value == []

"""What a raw row must be to become a conversation. Nothing is corrected: a row is right or it is refused."""

from collections.abc import Mapping
from typing import Any

from lib.core.examples import Conversation, Message

ROW_KEYS = ("messages", "id", "answer")
MESSAGE_KEYS = ("role", "content")
ROLES = ("system", "user", "assistant")
MAX_ID_CHARACTERS = 256


class RowRefused(Exception):
    """One row can't be used; the message is the reason, without the place."""


def check_row(row: object, source: str) -> Conversation:
    """The conversation in a raw row; `source` is its `file:line` and its id where it has none of its own.

    Raises:
        RowRefused: the reason, with field and value.
    """
    if not isinstance(row, Mapping):
        raise RowRefused(f'is {_kind(row)}, expected an object {{"messages": [...]}}')
    unknown = sorted(str(key) for key in row.keys() - set(ROW_KEYS))
    if unknown:
        raise RowRefused(
            f"has unknown field {unknown[0]!r}; a row has messages and, if need be, id and answer; rename or remove it"
        )
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RowRefused(f"messages is {_kind(messages)}, expected a list of at least one user and one assistant message")
    checked = tuple(_check_message(message, number) for number, message in enumerate(messages, start=1))
    _check_order([message.role for message in checked])
    return Conversation(
        sample_id=_check_id(row["id"]) if row.get("id") is not None else source,
        messages=checked,
        source=source,
        answer=_check_text(row["answer"], "answer") if row.get("answer") is not None else None,
    )


def _check_message(message: object, number: int) -> Message:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise RowRefused(f'{where} is {_kind(message)}, expected {{"role": ..., "content": ...}}')
    for key in MESSAGE_KEYS:
        if key not in message:
            raise RowRefused(f"{where} has no {key!r}")
    unknown = sorted(str(key) for key in message.keys() - set(MESSAGE_KEYS))
    if unknown:
        raise RowRefused(f"{where} has unknown field {unknown[0]!r}; a message has role and content only")
    role = message["role"]
    if role not in ROLES:
        raise RowRefused(f"{where} has role {_shown(role)}; expected one of {', '.join(ROLES)}")
    return Message(role, _check_text(message["content"], f"{where} ({role}): content"))


def _check_order(roles: list[str]) -> None:
    """[system] user assistant [user assistant ...]: the order every chat template takes."""
    if "assistant" not in roles:
        raise RowRefused("has no assistant message, so nothing to learn from")
    start = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[start:], start=start + 1):
        expected = "user" if (number - start) % 2 == 1 else "assistant"
        if role != expected:
            raise RowRefused(
                f"message {number} is of the {role}, expected of the {expected}; "
                "after an optional first system message, user and assistant take turns"
            )
    if roles[-1] != "assistant":
        raise RowRefused(f"ends with a message of the {roles[-1]}; the last one must be the assistant's")


def _check_id(value: object) -> str:
    text = _check_text(value, "id")
    if len(text) > MAX_ID_CHARACTERS or not text.isprintable():
        raise RowRefused(f"id {text[:40]!r} is longer than {MAX_ID_CHARACTERS} characters or not printable")
    return text


def _check_text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RowRefused(f"{what} is {_kind(value)}, expected text")
    if not value.strip():
        raise RowRefused(f"{what} is blank")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRefused(f"{what} holds half a surrogate pair at character {error.start}, which is no text") from error
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "missing or null"
    if isinstance(value, Mapping | list | str) and not value:
        return f"an empty {type(value).__name__}"
    return f"of type {type(value).__name__} ({_shown(value)})"


def _shown(value: object) -> str:
    return ascii(value)[:60]

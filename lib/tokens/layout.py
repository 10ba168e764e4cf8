"""How a chat format writes conversations of one shape: fixed text, and slots for what the messages say."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from lib.core.examples import Message

Strip = Literal["", "\n", " ", "white"]
"""What a format takes off an end of a text: nothing, newlines, spaces, or all white space."""


class Turn(NamedTuple):
    """What the layout of a message depends on."""

    role: str
    has_content: bool = True
    has_thinking: bool = False
    calls_with_id: tuple[bool, ...] = ()
    """One for each call of a tool."""
    has_name: bool = False
    has_call_id: bool = False


class Shape(NamedTuple):
    """What the layout of a conversation depends on."""

    turns: tuple[Turn, ...]
    tools: tuple[str, ...] = ()
    generation: bool = False
    """Whether the header of the turn that a model is to write comes last."""


@dataclass(frozen=True)
class Slot:
    """A value of a message, as the format writes it."""

    message: int
    field: Literal["content", "thinking", "name", "call_id", "call name", "call arguments", "call own id"]
    call: int = 0
    left: Strip = ""
    right: Strip = ""
    in_json: bool = False
    """Written as the inside of a JSON string."""


@dataclass(frozen=True)
class Segment:
    """A part of a rendering."""

    text: str | Slot
    turn: int | None = None
    """The assistant's message that it belongs to; None: written by the format or by others, never trained."""
    thinking: bool = False
    """Part of a thinking block, its marks included."""


Layout = tuple[Segment, ...]


class ChatFormat(Protocol):
    """A way to write conversations."""

    def layout(self, shape: Shape) -> Layout:
        """Raises FormatRefused when the format has no way to write this shape."""

    def special(self, text: str) -> bool:
        """Whether the format may treat this text unlike others, so that `exact_layout` must be asked."""

    def exact_layout(self, shape: Shape, messages: Sequence[Message]) -> Layout:
        """The layout of this very conversation. Raises FormatRefused when its text can't be found in its rendering."""

    def reference(self, shape: Shape, messages: Sequence[Message]) -> str | None:
        """The text by independent means, to check renderings with; None where the format has no other means."""

    def stop_texts(self) -> tuple[str, ...]:
        """Control tokens that end an assistant's turn."""


class FormatRefused(Exception):
    """A conversation can't be written in a format; the message says why, and callers add the place."""


_PLAIN = {role: Turn(role) for role in ("system", "developer", "user", "assistant", "tool")}


def turn_of(message: Message) -> Turn:
    """The shape of one message."""
    if message.content and message.thinking is None and not message.tool_calls and not message.name and not message.call_id:
        return _PLAIN[message.role]
    return Turn(
        message.role,
        bool(message.content),
        bool(message.thinking),
        tuple(bool(call.call_id) for call in message.tool_calls),
        bool(message.name),
        bool(message.call_id),
    )


def value_of(slot: Slot, messages: Sequence[Message]) -> str:
    """The text that a slot stands for.

    Raises:
        FormatRefused: the arguments of a call are not a JSON object.
    """
    text = _VALUES[slot.field](messages[slot.message], slot.call)
    if slot.left:
        text = text.lstrip(None if slot.left == "white" else slot.left)
    if slot.right:
        text = text.rstrip(None if slot.right == "white" else slot.right)
    return json.dumps(text, ensure_ascii=False)[1:-1] if slot.in_json else text


def _arguments(message: Message, call: int) -> str:
    text = message.tool_calls[call].arguments
    try:
        value = json.loads(text)
    except ValueError as error:
        raise FormatRefused(f"the arguments of its call of {message.tool_calls[call].name!r} are not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatRefused(
            f"the arguments of its call of {message.tool_calls[call].name!r} are {text[:40]!r}, not a JSON object"
        )
    return json.dumps(value, ensure_ascii=False)


_VALUES: dict[str, Callable[[Message, int], str]] = {
    "content": lambda message, _: message.content,
    "thinking": lambda message, _: message.thinking or "",
    "name": lambda message, _: message.name or "",
    "call_id": lambda message, _: message.call_id or "",
    "call name": lambda message, call: message.tool_calls[call].name,
    "call arguments": _arguments,
    "call own id": lambda message, call: message.tool_calls[call].call_id or "",
}
"""Serving stacks parse the arguments of a call and write them anew, so their spacing is that of json.dumps."""


def text_of(layout: Layout, messages: Sequence[Message]) -> str:
    """The whole text of a conversation."""
    return "".join(part.text if isinstance(part.text, str) else value_of(part.text, messages) for part in layout)

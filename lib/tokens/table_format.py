"""A chat format given as a table: what is written before and after a message of each role."""

import json
from collections.abc import Sequence

from lib.core.errors import ConfigError
from lib.core.examples import ROLES, Message
from lib.tokens.layout import FormatRefused, Layout, Segment, Shape, Slot
from lib.tokens.tokenizer import Tokenizer

_EXAMPLE = '{"start": "<s>", "roles": {"user": ["<|user|>", "<|end|>"], "assistant": ["<|assistant|>", "<|end|>"]}}'


class TableFormat:
    """Writes `start`, then each message between its role's two texts; knows no tools and no thinking."""

    def __init__(self, table: str, tokenizer: Tokenizer) -> None:
        """Raises ConfigError when the table isn't one, or an assistant's turn wouldn't end with a control token."""
        try:
            values = json.loads(table)
            self._start: str = values.pop("start", "")
            self._around: dict[str, tuple[str, str]] = {role: (str(a), str(b)) for role, (a, b) in values.pop("roles").items()}
            if values or not isinstance(self._start, str) or not set(self._around) <= set(ROLES):
                raise ValueError(f"has keys or roles that aren't known ({', '.join([*values, *self._around])})")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ConfigError(f"config.data.chat_table: {error}; expected JSON such as {_EXAMPLE}") from error
        for role in ("user", "assistant"):
            if role not in self._around:
                raise ConfigError(f"config.data.chat_table: has no role {role!r}; expected JSON such as {_EXAMPLE}")
        header, after = self._around["assistant"]
        begin, stop = next(tokenizer.control_text.spans(after), (1, 1))
        if begin or not header:
            raise ConfigError(
                "config.data.chat_table: an assistant's turn must have a text before it, and after it begin with a control "
                f"token of the tokenizer, so that a model can learn to stop; found {header!r} and {after!r}"
            )
        self._end, self._rest = after[:stop], after[stop:]

    def layout(self, shape: Shape) -> Layout:
        if shape.tools:
            raise FormatRefused("it offers tools, and a table format has no way to write them")
        found = [Segment(self._start)]
        for number, turn in enumerate(shape.turns):
            if turn.role not in self._around:
                raise FormatRefused(f"message {number + 1} has the role {turn.role!r}, which the chat_table lacks")
            if turn.has_thinking or turn.calls_with_id:
                raise FormatRefused(f"message {number + 1} has thinking or calls tools, which a table can't write")
            before, after = self._around[turn.role]
            content = [Segment(Slot(number, "content"))] if turn.has_content else []
            if turn.role == "assistant":
                content = [Segment(part.text, number) for part in content] + [Segment(self._end, number)]
                after = self._rest
            found += [Segment(before), *content, Segment(after)]
        if shape.generation:
            found.append(Segment(self._around["assistant"][0]))
        return tuple(part for part in found if part.text != "")

    def special(self, text: str) -> bool:
        return False

    def exact_layout(self, shape: Shape, messages: Sequence[Message]) -> Layout:
        return self.layout(shape)

    def reference(self, shape: Shape, messages: Sequence[Message]) -> None:
        return None

    def stop_texts(self) -> tuple[str, ...]:
        return (self._end,)

"""Encoding the runs of many conversations in one call of the tokenizer."""

from collections.abc import Callable, Sequence

from lib.core.errors import DataError
from lib.core.examples import Message
from lib.tokens.layout import FormatRefused
from lib.tokens.program import Program, Run
from lib.tokens.tokenizer import Tokenizer

_TEXTS_KEPT = 4096
_MAX_KEPT_CHARACTERS = 1 << 14


class RunEncoder:
    """Encodes runs of text; remembers those that are likely to come again, such as system messages."""

    def __init__(self, tokenizer: Tokenizer, *, refuse_control: bool) -> None:
        self._tokenizer = tokenizer
        self._refuse_control = refuse_control
        self._kept: dict[str, list[int]] = {}

    def encode(self, rows: Sequence[tuple[Sequence[Message], Program]], place: Callable[[int], str]) -> list[list[list[int]]]:
        """Ids of every run of every row, all encoded in one call but those that are known.

        Args:
            place: number of a row -> how errors name it.
        Raises:
            DataError: a value can't be written, or where that is refused, a run spells a control token.
        """
        texts: list[str] = []
        new: dict[str, int] = {}
        found = []
        for number, (messages, program) in enumerate(rows):
            try:
                found.append([self._known_or_number(run, run.text(messages), texts, new) for run in program.runs])
            except FormatRefused as refused:
                raise DataError(f"{place(number)}: {refused}") from refused
        if self._refuse_control and any(map(self._tokenizer.control_text.first, texts)):
            for number, (messages, program) in enumerate(rows):
                self._refuse_spelled(messages, program, place(number))
        encoded = self._tokenizer.encode_texts(texts)
        for text, place_in_texts in new.items():
            if len(self._kept) < _TEXTS_KEPT:
                self._kept[text] = encoded[place_in_texts]
        return [[encoded[item] if isinstance(item, int) else item for item in row] for row in found]

    def refuse_control_tokens(self, messages: Sequence[Message], where: str) -> None:
        """Raises DataError that names the message which holds a control token, unless such text is encoded as plain text."""
        if not self._refuse_control:
            return
        for number, message in enumerate(messages, start=1):
            if found := next(filter(None, map(self._tokenizer.control_text.first, said([message]))), None):
                raise DataError(
                    f"{where}: message {number} ({message.role}) holds the control token {found!r}, which the tokenizer would "
                    "read as an instruction; remove it from the text, or set config.data.control_tokens to 'split'"
                )

    def _known_or_number(self, run: Run, text: str, texts: list[str], new: dict[str, int]) -> list[int] | int:
        """The ids of a run where it came before, else its place in `texts`, to which it is added."""
        if run.repeats and len(text) <= _MAX_KEPT_CHARACTERS:
            if (ids := self._kept.get(text)) is not None:
                return ids
            if (number := new.get(text)) is not None:
                return number
            new[text] = len(texts)
        texts.append(text)
        return len(texts) - 1

    def _refuse_spelled(self, messages: Sequence[Message], program: Program, where: str) -> None:
        for run in program.runs:
            if found := self._tokenizer.control_text.first(run.text(messages)):
                self.refuse_control_tokens(messages, where)
                raise DataError(f"{where}: its text together with the chat format spells {found!r}; change the text")


def said(messages: Sequence[Message]) -> list[str]:
    """All text of messages."""
    found = []
    for message in messages:
        found.append(message.content)
        if message.thinking:
            found.append(message.thinking)
        for call in message.tool_calls:
            found += [call.name, call.arguments, call.call_id or ""]
        if message.name or message.call_id:
            found += [message.name or "", message.call_id or ""]
    return found

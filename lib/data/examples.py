"""Where streams get checked examples from."""

from collections.abc import Iterator
from dataclasses import dataclass

from lib.core.examples import Completion, Conversation, Event, EventSequence, Example, Message, PreferencePair, Prompt
from lib.data.rows import ConversationTable
from lib.data.shuffle import SourceRow


@dataclass(frozen=True)
class TableExamples:
    """The rows of an ingested data set."""

    table: ConversationTable

    @property
    def digest(self) -> str:
        return self.table.digest

    @property
    def num_splits(self) -> int:
        return 1

    def read(self, split: int, start: int = 0, step: int = 1) -> Iterator[SourceRow]:
        assert split == 0, split
        for row in range(start, len(self.table), step):
            example = self.table[row]
            yield SourceRow(row, num_characters(example), example)


def num_characters(example: Example) -> int:
    """Characters of all text in an example."""
    match example:
        case Conversation():
            return _of_messages(example.messages) + sum(map(len, example.tools))
        case Completion():
            return len(example.prompt) + len(example.completion)
        case PreferencePair():
            return sum(map(_of_messages, (example.prompt, example.chosen, example.rejected)))
        case Prompt():
            return _of_messages(example.messages) + len(example.payload) + sum(map(len, example.tools))
        case EventSequence():
            return sum(map(_of_event, example.events))


def _of_messages(messages: tuple[Message, ...]) -> int:
    return sum(
        len(message.content) + len(message.thinking or "") + sum(len(call.arguments) for call in message.tool_calls)
        for message in messages
    )


def _of_event(event: Event) -> int:
    return len(event.item) + len(event.action)

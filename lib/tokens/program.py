"""A layout made ready for encoding: ids of what is fixed, and the runs of text between control tokens.

A tokenizer cuts text at control tokens before anything else, so what lies between two of them can be encoded on its own.
Runs are encoded by a pipeline that knows no control tokens: what a message says can't become one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib.core.examples import Message
from lib.tokens.layout import Layout, Slot, value_of

if TYPE_CHECKING:
    from lib.tokens.tokenizer import Tokenizer

Parts = list[tuple[str | Slot, int]]
"""Text and slots of a run under way, each with its turn."""

NO_TURN = -1
"""Turn of what is never trained: weights have one more entry at the end, 0."""


@dataclass(frozen=True)
class Fixed:
    """Ids that are the same in every conversation of the shape."""

    ids: list[int]
    on: list[bool]
    off: list[bool]
    turn: int


@dataclass(frozen=True)
class Run:
    """Text with at least one slot, between two control tokens."""

    parts: tuple[str | Slot, ...]
    turns: tuple[int, ...]
    """Of each part."""
    turn: int
    """Of the end of the run."""
    header_ids: list[int]
    """Ids of the fixed text before the first part of `turn`, encoded alone; empty if there is none."""
    simple: bool
    """All parts are of one turn, but for a fixed header that is not trained."""
    repeats: bool
    """Likely the same in many conversations: a system message."""

    def text(self, messages: Sequence[Message]) -> str:
        """Raises FormatRefused, see value_of."""
        return "".join([part if isinstance(part, str) else value_of(part, messages) for part in self.parts])

    def bounds(self, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """(end of a stretch in characters, its turn), in order."""
        found: list[tuple[int, int]] = []
        stop = 0
        for part, turn in zip(self.parts, self.turns):
            stop += len(part if isinstance(part, str) else value_of(part, messages))
            if found and found[-1][1] == turn:
                found.pop()
            found.append((stop, turn))
        return found


@dataclass(frozen=True)
class Program:
    """What to do for each conversation of one shape."""

    items: tuple[Fixed | Run, ...]
    runs: tuple[Run, ...]
    """Those of the items that are runs."""


def compile_layout(layout: Layout, tokenizer: "Tokenizer", *, train_thinking: bool, quiet: frozenset[int]) -> Program:
    """Cut a layout at its control tokens and encode what is fixed.

    Args:
        quiet: messages that repeat between conversations, system messages above all.
    """
    items: list[Fixed | Run] = []
    parts: Parts = []
    for segment in layout:
        turn = NO_TURN if segment.turn is None or (segment.thinking and not train_thinking) else segment.turn
        if isinstance(segment.text, Slot):
            parts.append((segment.text, turn))
            continue
        start = 0
        for begin, end in tokenizer.control_text.spans(segment.text):
            if begin > start:
                parts.append((segment.text[start:begin], turn))
            _close(items, parts, tokenizer, quiet)
            _append(items, [tokenizer.control_tokens[segment.text[begin:end]]], turn)
            start = end
        if start < len(segment.text):
            parts.append((segment.text[start:], turn))
    _close(items, parts, tokenizer, quiet)
    return Program(tuple(items), tuple(item for item in items if isinstance(item, Run)))


def _close(items: list[Fixed | Run], parts: Parts, tokenizer: "Tokenizer", quiet: frozenset[int]) -> None:
    """End a run of text: one Run, or ids where all of it is fixed."""
    if not parts:
        return
    turns = tuple(turn for _, turn in parts)
    run = Run(tuple(part for part, _ in parts), turns, turns[-1], *_header(parts, tokenizer), repeats=_repeats(parts, quiet))
    parts.clear()
    if any(isinstance(part, Slot) for part in run.parts):
        items.append(run)
        return
    ids, of_token = place_tokens(tokenizer, run, ())
    for token_id, turn in zip(ids, of_token):
        _append(items, [token_id], turn)


def _header(parts: Sequence[tuple[str | Slot, int]], tokenizer: "Tokenizer") -> tuple[list[int], bool]:
    """(ids of the fixed part before what is trained, whether the run is that simple)."""
    first = next((number for number, (_, turn) in enumerate(parts) if turn == parts[-1][1]), 0)
    head, rest = parts[:first], parts[first:]
    text = "".join(part for part, _ in head if isinstance(part, str))
    simple = all(turn == NO_TURN and isinstance(part, str) for part, turn in head)
    simple = simple and all(turn == parts[-1][1] for _, turn in rest)
    return (tokenizer.encode_text(text) if text else []), simple


def _repeats(parts: Sequence[tuple[str | Slot, int]], quiet: frozenset[int]) -> bool:
    return all(part.message in quiet for part, _ in parts if isinstance(part, Slot))


def _append(items: list[Fixed | Run], ids: list[int], turn: int) -> None:
    last = items[-1] if items else None
    if isinstance(last, Fixed) and last.turn == turn:
        ids = last.ids + ids
        items.pop()
    items.append(Fixed(ids, [True] * len(ids), [False] * len(ids), turn))


def place_tokens(tokenizer: "Tokenizer", run: Run, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids of a run, and for each the turn whose text it lies in; NO_TURN for one that covers a border.

    A token that also covers characters before an answer (a newline of the header merged with one of the content) is not
    trained: at inference the header is given, so that token is never asked for.
    """
    encoding = tokenizer.text_backend.encode(run.text(messages), add_special_tokens=False)
    stretches = iter(run.bounds(messages))
    begin, (stop, turn) = 0, next(stretches)
    turns = []
    for start, end in encoding.offsets:
        while start >= stop and (following := next(stretches, None)) is not None:
            begin, (stop, turn) = stop, following
        turns.append(turn if begin <= start and end <= stop else NO_TURN)
    return list(encoding.ids), turns

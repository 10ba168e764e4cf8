"""What exactly is trained: tokenised rows and packed rows as JSON values and as pages, made by the code that feeds training."""

import html
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from lib.core.examples import (
    IGNORE_INDEX,
    Completion,
    Conversation,
    Encoded,
    EventSequence,
    Example,
    PreferencePair,
    Prompt,
)
from lib.data.batch import collate
from lib.data.document import Document
from lib.data.feed import ChatFeed
from lib.data.shuffle import ExampleSource
from lib.data.stream import Share, StepRows
from lib.tokens.chat import ChatEncoder
from lib.tokens.encoders import encode_completions, encode_pairs, encode_prompts
from lib.tokens.tokenizer import Tokenizer

_ROWS_AT_ONCE = 256
_PAGE_STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#1f2328;background:#fff}"
    "h2{font-size:1em;margin:1.5em 0 .3em}"
)


@dataclass(frozen=True)
class Part:
    """Tokens of a row: all of them, or one of the answers that it compares."""

    name: str
    """Empty where a row has one part only."""
    encoded: Encoded

    @property
    def weights(self) -> list[float]:
        """[T] factor on the loss of each token; 0 where it is not trained."""
        return self.encoded.weights or [float(trained) for trained in self.encoded.loss_mask]


@dataclass(frozen=True)
class InspectedRow:
    """A row as it is trained on, or as a policy is given it."""

    source_name: str
    """Of the mixture."""
    example: Example | Document
    parts: tuple[Part, ...]
    """None of events, which no tokenizer reads."""

    @property
    def place(self) -> str:
        """Where it came from; empty for rows that were tokenised before."""
        return getattr(self.example, "source", "")


def encoded_rows(sources: Mapping[str, ExampleSource], encoder: ChatEncoder) -> Iterator[InspectedRow]:
    """All rows, source after source in the order of their files; a bounded number of them in memory.

    Raises (while iterating):
        DataError: a row can't be used or tokenised.
    """
    for name, source in sources.items():
        examples = (row.example for split in range(source.num_splits) for row in source.read(split))
        while batch := list(itertools.islice(examples, _ROWS_AT_ONCE)):
            for example, parts in zip(batch, encoded_parts(batch, encoder), strict=True):
                yield InspectedRow(name, example, parts)


def encoded_parts(examples: Sequence[Any], encoder: ChatEncoder) -> list[tuple[Part, ...]]:
    """Tokens of examples of one kind.

    Raises:
        DataError: a row can't be tokenised.
    """
    match examples[0]:
        case Conversation():
            return [(Part("", encoded),) for encoded in encoder.encode(examples)]
        case Completion():
            return [(Part("", encoded),) for encoded in encode_completions(encoder, examples)]
        case PreferencePair():
            pairs = encode_pairs(encoder, examples)
            return [(Part("chosen", pair.chosen), Part("rejected", pair.rejected)) for pair in pairs]
        case Prompt():
            found = encode_prompts(encoder, examples)
            return [(Part("", Encoded(row.sample_id, row.token_ids, [False] * len(row.token_ids))),) for row in found]
        case Document():
            return [(Part("", document.encoded()),) for document in examples]
    return [() for _ in examples]


def row_values(row: InspectedRow, tokenizer: Tokenizer) -> dict[str, Any]:
    """Row id, place, and of each part tokens, mask, weights and the text of each run of trained tokens, as JSON values.

    A run is [start, stop) in tokens. A character whose bytes lie in tokens inside and outside of a run shows as U+FFFD there.
    """
    values: dict[str, Any] = {"row_id": row.example.sample_id, "place": row.place, "source": row.source_name}
    match row.example:
        case PreferencePair(margin=margin):
            values["margin"] = margin
        case Prompt(verifier=verifier, payload=payload):
            values |= {"verifier": verifier, "payload": payload}
        case EventSequence(member=member, events=events):
            values |= {"member": member, "events": [asdict(event) for event in events]}
    for part in row.parts:
        values |= {part.name: _part_values(part, tokenizer)} if part.name else _part_values(part, tokenizer)
    return values


def _part_values(part: Part, tokenizer: Tokenizer) -> dict[str, Any]:
    encoded = part.encoded
    runs = [
        {"start": start, "stop": stop, "text": tokenizer.decode(encoded.token_ids[start:stop])}
        for start, stop, trained in runs_of(encoded.loss_mask)
        if trained
    ]
    return {"token_ids": encoded.token_ids, "loss_mask": encoded.loss_mask, "weights": part.weights, "trained": runs}


def runs_of(mask: Iterable[bool]) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, value) of each run of equal values."""
    start = 0
    for value, run in itertools.groupby(mask):
        stop = start + sum(1 for _ in run)
        yield start, stop, value
        start = stop


def packed_rows(feed: ChatFeed, encoder: ChatEncoder) -> Iterator[dict[str, Any]]:
    """The rows that a run trains on, in order, endless, as JSON values: all slots, padding included (document_ids -1).

    Row g is of step g // rows_per_step + 1, and whichever rank trains it gets these very values.

    Raises (while iterating):
        ConfigError, DataError: see PackedStream, `open_mixture`.
    """
    stream = feed.streams(encoder, [Share()])[0]
    for step in itertools.count(1):
        yield from _step_values(stream.next_step(), step, feed, encoder.tokenizer.pad_id)


def _step_values(found: StepRows, step: int, feed: ChatFeed, pad_id: int) -> Iterator[dict[str, Any]]:
    for number, row in zip(found.numbers, found.rows):
        batch = collate([row], feed.sequence_length, pad_id)
        weights = batch.labels.ne(IGNORE_INDEX).float() if batch.weights is None else batch.weights
        yield {
            "row": number,
            "step": step,
            "stream": number % feed.config.num_streams,
            "sample_ids": list(batch.sample_ids[0]),
            "num_targets": batch.num_targets,
            "token_ids": batch.token_ids[0].tolist(),
            "labels": batch.labels[0].tolist(),
            "positions": batch.positions[0].tolist(),
            "document_ids": batch.document_ids[0].tolist(),
            "weights": weights[0].tolist(),
        }


def trained_text(row: InspectedRow, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The row as (text, whether it is trained), safe to print: whatever a terminal could obey is written as its code."""
    found: list[tuple[str, bool]] = []
    for part in row.parts:
        encoded = part.encoded
        found += [(f"{part.name}:\n", False)] if part.name else []
        found += [
            (printable(tokenizer.decode(encoded.token_ids[start:stop])), trained)
            for start, stop, trained in runs_of(encoded.loss_mask)
        ]
        found += [("\n", False)] if part.name else []
    return found or [(printable(event_lines(row.example)), False)]


def event_lines(example: Example | Document) -> str:
    """One line for each event of a member; empty for other examples."""
    if not isinstance(example, EventSequence):
        return ""
    lines = []
    for event in example.events:
        when = datetime.fromtimestamp(event.timestamp, UTC).isoformat(" ")
        value = "" if event.value is None else f" = {event.value:g}"
        lines.append(f"{when} {event.action} {event.item}{value}\n")
    return "".join(lines)


def printable(text: str) -> str:
    """`text` with everything but printable characters and newlines as `\\x1b`, `\\u202e` and so on."""
    return "".join(
        character if character == "\n" or character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def preview_page(rows: Iterable[InspectedRow], encoder: ChatEncoder) -> str:
    """One HTML page: each row with its trained tokens coloured. All text is escaped; nothing is loaded from elsewhere."""
    parts = [f"<h2>{html.escape(heading(row))}</h2>{preview_html(row, encoder)}" for row in rows]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>What is trained</title>'
        f"<style>{_PAGE_STYLE}</style></head><body><h1>What is trained</h1>"
        f"<p>Coloured tokens are trained; the rest is context.</p>{''.join(parts)}</body></html>"
    )


def preview_html(row: InspectedRow, encoder: ChatEncoder) -> str:
    """A row with its trained tokens coloured; all text is escaped."""
    parts = [
        (f"<p>{html.escape(part.name)}</p>" if part.name else "") + encoder.preview_html(part.encoded) for part in row.parts
    ]
    return "".join(parts) or f"<pre>{html.escape(event_lines(row.example))}</pre>"


def heading(row: InspectedRow) -> str:
    """One line about a row, safe to print."""
    figures = [
        f"{part.name} {sum(part.encoded.loss_mask)} of {len(part.encoded.token_ids)} tokens trained".lstrip()
        for part in row.parts
    ]
    named = [row.example.sample_id, *([row.place] if row.place else []), *figures]
    return printable(" · ".join(named)).replace("\n", "\\n")

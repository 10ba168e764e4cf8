"""What exactly is trained: tokenised rows and packed rows as JSON values and as pages, made by the code that feeds training."""

import html
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lib.core.examples import IGNORE_INDEX, Conversation, Encoded
from lib.data.batch import collate
from lib.data.feed import ChatFeed
from lib.data.shuffle import ExampleSource
from lib.data.stream import Share, StepRows
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer

_ROWS_AT_ONCE = 256
_PAGE_STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#1f2328;background:#fff}"
    "h2{font-size:1em;margin:1.5em 0 .3em}"
)


@dataclass(frozen=True)
class InspectedRow:
    """A row as it is trained on."""

    source_name: str
    """Of the mixture."""
    conversation: Conversation
    encoded: Encoded

    @property
    def weights(self) -> list[float]:
        """[T] factor on the loss of each token; 0 where it is not trained."""
        return self.encoded.weights or [float(trained) for trained in self.encoded.loss_mask]


def encoded_rows(sources: Mapping[str, ExampleSource], encoder: ChatEncoder) -> Iterator[InspectedRow]:
    """All rows, source after source in the order of their files; a bounded number of them in memory.

    Raises (while iterating):
        DataError: a row can't be used or tokenised.
    """
    for name, source in sources.items():
        examples = (row.example for split in range(source.num_splits) for row in source.read(split))
        while batch := list(itertools.islice(examples, _ROWS_AT_ONCE)):
            for conversation, encoded in zip(batch, encoder.encode(batch)):
                yield InspectedRow(name, conversation, encoded)


def row_values(row: InspectedRow, tokenizer: Tokenizer) -> dict[str, Any]:
    """Row id, place, tokens, mask, weights, and the text of each run of trained tokens, as JSON values.

    A run is [start, stop) in tokens. A character whose bytes lie in tokens inside and outside of a run shows as U+FFFD there.
    """
    encoded = row.encoded
    runs = [
        {"start": start, "stop": stop, "text": tokenizer.decode(encoded.token_ids[start:stop])}
        for start, stop, trained in runs_of(encoded.loss_mask)
        if trained
    ]
    return {
        "row_id": encoded.sample_id,
        "place": row.conversation.source,
        "source": row.source_name,
        "token_ids": encoded.token_ids,
        "loss_mask": encoded.loss_mask,
        "weights": row.weights,
        "trained": runs,
    }


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
    encoded = row.encoded
    return [
        (printable(tokenizer.decode(encoded.token_ids[start:stop])), trained)
        for start, stop, trained in runs_of(encoded.loss_mask)
    ]


def printable(text: str) -> str:
    """`text` with everything but printable characters and newlines as `\\x1b`, `\\u202e` and so on."""
    return "".join(
        character if character == "\n" or character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def preview_page(rows: Iterable[InspectedRow], encoder: ChatEncoder) -> str:
    """One HTML page: each row with its trained tokens coloured. All text is escaped; nothing is loaded from elsewhere."""
    parts = [
        f"<h2>{html.escape(printable(f'{row.encoded.sample_id} · {row.conversation.source}'))} · {_figures(row)}</h2>"
        f"{encoder.preview_html(row.encoded)}"
        for row in rows
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>What is trained</title>'
        f"<style>{_PAGE_STYLE}</style></head><body><h1>What is trained</h1>"
        f"<p>Coloured tokens are trained; the rest is context.</p>{''.join(parts)}</body></html>"
    )


def _figures(row: InspectedRow) -> str:
    return f"{sum(row.encoded.loss_mask)} of {len(row.encoded.token_ids)} tokens trained"


def heading(row: InspectedRow) -> str:
    """One line about a row, safe to print."""
    return printable(f"{row.encoded.sample_id} · {row.conversation.source} · {_figures(row)}").replace("\n", "\\n")

"""Checked examples in splits: of a data set that holds them, or straight from a source, checked as they are read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.config.data import DataConfig
from lib.config.rows import Kind, RowsConfig
from lib.core.artifact import read_manifest
from lib.core.errors import DataError
from lib.core.examples import Completion, Conversation, Event, EventSequence, Example, Message, PreferencePair, Prompt
from lib.core.manifest import MANIFEST_NAME, digest_of
from lib.data.checks import RowRefused
from lib.data.in_place import FORMAT as IN_PLACE
from lib.data.in_place import read_places
from lib.data.mixture import OWN_DATA
from lib.data.rows import checked_row
from lib.data.schemas.arrow import TYPE_OF
from lib.data.schemas.layouts import Layout, find_layout
from lib.data.shards import open_shard
from lib.data.shuffle import ExampleSource, SourceRow
from lib.data.sources import open_source
from lib.data.sources_types import RowSource
from lib.data.table import ExampleTable
from lib.data.tokenized import FORMAT as TOKENIZED
from lib.data.tokenized import TokenizedExamples


@dataclass(frozen=True)
class TableExamples:
    """The rows of an ingested data set, in the splits of the source it was made from."""

    table: ExampleTable[Any]

    @property
    def digest(self) -> str:
        return self.table.digest

    @property
    def num_splits(self) -> int:
        return len(self.table.splits)

    def read(self, split: int, start: int = 0, step: int = 1) -> Iterator[SourceRow]:
        """See ExampleSource.read."""
        for number, example in enumerate(self.table.read(split, start, step)):
            yield SourceRow(start + number * step, num_characters(example), example)


@dataclass(frozen=True)
class CheckedExamples:
    """The rows of a source, each checked when it is read. A bad one is an error: nothing is left out unseen."""

    source: RowSource
    layout: Layout
    verifiers: Sequence[str] = ()
    """That prompts may name; empty: any."""

    @property
    def digest(self) -> str:
        return self.source.digest

    @property
    def num_splits(self) -> int:
        return len(self.source.splits)

    def read(self, split: int, start: int = 0, step: int = 1) -> Iterator[SourceRow]:
        """See ExampleSource.read."""
        for number, raw in enumerate(self.source.read(split, start, step)):
            try:
                example = checked_row(raw, self.layout, self.verifiers)
            except RowRefused as refused:
                raise DataError(f"{raw.place}: {refused}; correct or remove the row") from refused
            yield SourceRow(start + number * step, num_characters(example), example)


def open_examples(where: str | Path, row_type: type[Example], *, kind: Kind) -> ExampleSource:
    """The examples at an address: an ingested data set, or rows as `open_source` finds them; or a data set's documents, where
    it was tokenised.

    Args:
        row_type, kind: of the examples, as a type and as its name among KINDS.
    Raises:
        DataError: nothing there, or no such examples.
        ArtifactCorruptError: a file of the data set is missing or altered.
    """
    if (Path(where) / MANIFEST_NAME).is_file():
        held = read_manifest(Path(where)).meta.get("format")
        if kind == "conversation" and held == TOKENIZED:
            return TokenizedExamples.open(Path(where))
        if held == IN_PLACE:
            return _open_in_place(Path(where), kind)
        return TableExamples(ExampleTable.open(Path(where), row_type))
    source = open_source(where)
    return CheckedExamples(source, find_layout(source, RowsConfig(kind=kind)))


def _open_in_place(folder: Path, kind: Kind) -> CheckedExamples:
    shard = read_places(folder)
    if shard.rows.kind != kind:
        raise DataError(f"{folder}: says where examples of kind {shard.rows.kind!r} are, expected a data set of kind {kind!r}")
    source = open_shard(shard)
    return CheckedExamples(source, find_layout(source, shard.rows), shard.rows.verifiers)


def kind_held(where: str | Path) -> Kind | None:
    """The kind of the examples in an ingested data set; None at any other address.

    Raises:
        DataError: an artifact that holds no examples.
    """
    if not (Path(where) / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(Path(where))
    held: Any = manifest.meta.get("format")
    if held == IN_PLACE:
        return read_places(Path(where)).rows.kind
    found: Kind = "conversation" if held == TOKENIZED else held
    if found not in TYPE_OF:
        raise DataError(f"{where}: holds a {manifest.kind!r} artifact, expected a data set")
    return found


def labelled_kind(where: Path) -> Kind:
    """The kind of the examples in a data set that can have labels.

    Raises:
        DataError: it holds others.
    """
    kind = kind_held(where)
    if kind not in ("conversation", "completion"):
        raise DataError(f"{where}: holds examples of kind {kind!r}; only conversations and completions have labels")
    return kind


def open_mixture(config: DataConfig, own_data: str | Path, row_type: type[Example], *, kind: Kind) -> dict[str, ExampleSource]:
    """The sources of a run by name: those of `config.mixture`, or the run's own data alone.

    Raises:
        DataError, ArtifactCorruptError: see `open_examples`; or a location holds other content than its `digest` says.
    """
    places = {source.name: source.location or own_data for source in config.mixture} or {OWN_DATA: own_data}
    sources = {name: open_examples(where, row_type, kind=kind) for name, where in places.items()}
    for source in config.mixture:
        if source.location and source.digest != (found := sources[source.name].digest):
            problem = "holds other rows than its digest says" if source.digest else "has no digest"
            raise DataError(
                f"data.mixture: source {source.name!r} ({source.location}) {problem}; set digest: {found} to use what is there"
            )
    return sources


def mixture_digest(sources: Mapping[str, ExampleSource]) -> str:
    """Names the content of all sources of a mixture."""
    return digest_of({name: source.digest for name, source in sources.items()})


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
    total = 0
    for message in messages:
        total += len(message.content) + len(message.thinking or "")
        for call in message.tool_calls:
            total += len(call.arguments)
    return total


def _of_event(event: Event) -> int:
    return len(event.item) + len(event.action)

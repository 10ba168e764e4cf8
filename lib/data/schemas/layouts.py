"""The layouts of rows that are known, and which one a source has: found by its columns, never by trying."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from lib.config.heads import HeadConfig
from lib.config.rows import RowsConfig
from lib.core.errors import DataError
from lib.core.examples import Completion, Conversation, Example
from lib.data.checks import RowRefused, check_known, check_object
from lib.data.schemas.answers import from_completion, from_preference, from_prompt, from_text
from lib.data.schemas.conversations import from_alpaca, from_completion_messages, from_messages, from_sharegpt
from lib.data.schemas.events import from_event_columns, from_events
from lib.data.schemas.labels import check_fit
from lib.data.sources_types import RawRow, RowSource

KINDS = ("conversation", "completion", "preference", "prompt", "events")
_NUM_TRIED = 100
"""Rows at the start of a source of which the first that fits a layout decides."""

_MAX_LISTED = 20
"""Columns named in an error."""


@dataclass(frozen=True)
class Layout:
    """Columns, and how they become an example."""

    name: str
    kind: str
    """Of the example: one of KINDS."""
    required: Mapping[str, type | tuple[type, ...]]
    """Column -> its type, by which layouts of the same columns are told apart."""
    optional: tuple[str, ...]
    build: Callable[[Mapping[str, Any], str], Example]
    ignored: frozenset[str] = frozenset()
    """Columns that the user wants left out."""
    heads: tuple[HeadConfig, ...] = ()
    """That the labels of conversations and completions are for; empty: any."""

    @cached_property
    def known(self) -> frozenset[str]:
        """All columns that a row may have."""
        return frozenset((*self.required, *self.optional))

    @property
    def columns(self) -> str:
        """For messages: the columns it needs and those it takes."""
        return ", ".join(self.required) + (f" (and {', '.join(self.optional)} if need be)" if self.optional else "")

    def check(self, row: object, place: str) -> Example:
        """The example in a raw row; `place` is its source, and its id where it has none of its own.

        Raises:
            RowRefused: the reason, with field and value.
        """
        columns = row if isinstance(row, dict) else check_object(row, "", f"an object of {', '.join(self.required)}")
        if self.ignored:
            columns = {key: value for key, value in columns.items() if key not in self.ignored}
        if not columns.keys() <= self.known:
            remedy = f"a row of the layout {self.name!r} has {self.columns}; rename, remove or ignore it"
            check_known(columns.keys(), self.known, "", remedy)
        for name in self.required:
            if columns.get(name) is None:
                raise RowRefused(f"{name} is missing or null")
        example = self.build(columns, place)
        if self.heads and isinstance(example, Conversation | Completion):
            check_fit(example.labels, self.heads)
        return example

    def fits(self, columns: Mapping[str, Any]) -> bool:
        """Whether it has all columns needed and no other; null or not, of whatever type."""
        names = columns.keys() - self.ignored
        return self.required.keys() <= names and names <= self.known

    def fits_types(self, columns: Mapping[str, Any]) -> bool:
        return all(isinstance(columns[name], type_) for name, type_ in self.required.items())


LAYOUTS = (
    Layout("messages", "conversation", {"messages": list}, ("id", "answer", "tools", "labels"), from_messages),
    Layout("sharegpt", "conversation", {"conversations": list}, ("id", "answer", "system", "tools", "labels"), from_sharegpt),
    Layout(
        "alpaca",
        "conversation",
        {"instruction": str, "output": str},
        ("id", "answer", "input", "system", "history", "labels"),
        from_alpaca,
    ),
    Layout(
        "completion_messages",
        "conversation",
        {"prompt": list, "completion": list},
        ("id", "answer", "tools", "labels"),
        from_completion_messages,
    ),
    Layout("completion", "completion", {"prompt": str, "completion": str}, ("id", "answer", "labels"), from_completion),
    Layout("text", "completion", {"text": str}, ("id", "labels"), from_text),
    Layout(
        "preference",
        "preference",
        {"chosen": (str, list), "rejected": (str, list)},
        ("id", "prompt", "margin", "score_chosen", "score_rejected"),
        from_preference,
    ),
    Layout("prompt", "prompt", {"prompt": (str, list), "verifier": str}, ("id", "payload", "answer", "tools"), from_prompt),
    Layout("events", "events", {"member": str, "events": list}, ("id",), from_events),
    Layout(
        "event_columns",
        "events",
        {"member": str, "items": list, "actions": list, "timestamps": list},
        ("id", "values"),
        from_event_columns,
    ),
)


def find_layout(source: RowSource, config: RowsConfig) -> Layout:
    """The one layout of the wanted kind that the columns of a source's first rows fit, or the one that is named.

    Raises:
        DataError: no layout fits, or more than one does: what was found and what each needs; or no row at all.
    """
    kind, layout, ignored = config.kind, config.layout, frozenset(config.ignored)
    wanted = [
        replace(known, ignored=ignored, heads=config.heads)
        for known in LAYOUTS
        if kind in ("", known.kind) and layout in ("", known.name)
    ]
    if not wanted:
        raise DataError(
            f"there is no layout {layout!r} for {kind or 'any kind'}; kinds are {', '.join(KINDS)}, layouts "
            f"{', '.join(f'{known.name} ({known.kind})' for known in LAYOUTS)}"
        )
    if layout:
        return wanted[0]
    first: RawRow | None = None
    for row in islice(_rows(source), _NUM_TRIED):
        if not isinstance(row.value, Mapping):
            first = first or row
            continue
        fitting = [known for known in wanted if known.fits(row.value)]
        if len(fitting) > 1:
            fitting = [known for known in fitting if known.fits_types(row.value)]
        if len(fitting) == 1:
            return fitting[0]
        first = row if first is None or not isinstance(first.value, Mapping) else first
    if first is None:
        raise DataError("holds no rows")
    raise DataError(_no_layout(first, wanted))


def _rows(source: RowSource) -> Iterator[RawRow]:
    for split in range(len(source.splits)):
        yield from source.read(split)


def _no_layout(row: RawRow, wanted: list[Layout]) -> str:
    if not isinstance(row.value, Mapping):
        found = row.problem or f"is of type {type(row.value).__name__}, expected an object"
        return f"{row.place}: {found}; none of the first {_NUM_TRIED} rows can be read, so there is no layout to be found"
    columns = _listed(row.value) or "of no name"
    lines = [f"  {known.name} ({known.kind}): {known.columns}" for known in wanted]
    remedy = "rename, remove or ignore columns so that one of these fits:"
    return "\n".join([f"{row.place}: has columns {columns}, {_why_none(row.value, wanted)}; {remedy}", *lines])


def _why_none(columns: Mapping[str, Any], wanted: list[Layout]) -> str:
    fitting = [known for known in wanted if known.fits(columns)]
    if len(fitting) > 1:
        return f"but not the types of any of {', '.join(known.name for known in fitting)}"
    near = [known for known in wanted if known.required.keys() <= columns.keys() - known.ignored]
    if len(near) == 1:
        return (
            f"which are those of {near[0].name!r} and the unknown {_listed(columns.keys() - near[0].ignored - near[0].known)}"
        )
    return "which fit no layout"


def _listed(names: Iterable[object]) -> str:
    found = sorted(map(str, names))
    more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
    return ", ".join(name[:60] for name in found[:_MAX_LISTED]) + more

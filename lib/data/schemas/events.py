"""Rows that become sequences of events: what a member did, in order of time."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from lib.core.examples import Event, EventSequence
from lib.data.checks import RowRefused, check_id, check_known, check_list, check_number, check_object, check_text, kind_of

Row = Mapping[str, Any]
MAX_TIMESTAMP = 10**11
"""Seconds until the year 5138; a later one is most likely in milliseconds."""
_COLUMNS = {"items": "item", "actions": "action", "timestamps": "timestamp", "values": "value"}


def from_events(row: Row, source: str) -> EventSequence:
    """`member` and `events` of item, action, timestamp and if need be value; if need be `id`."""
    found = check_list(row["events"], "events", "a list of at least one event")
    return _sequence(row, source, [check_object(event, f"event {n}", '{"item": ..., ...}') for n, event in enumerate(found, 1)])


def from_event_columns(row: Row, source: str) -> EventSequence:
    """`member` and the lists `items`, `actions`, `timestamps` and if need be `values`, of the same length; if need be `id`."""
    given = [name for name in _COLUMNS if name != "values" or row.get(name) is not None]
    columns = {name: check_list(row[name], name, "a list of at least one entry") for name in given}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise RowRefused(f"has lists of different lengths ({', '.join(f'{k}: {n}' for k, n in lengths.items())})")
    names = [_COLUMNS[name] for name in given]
    return _sequence(row, source, [dict(zip(names, values)) for values in zip(*columns.values())])


def _sequence(row: Row, source: str, events: list[Mapping[str, Any]]) -> EventSequence:
    checked = tuple(_event(event, f"event {number}") for number, event in enumerate(events, start=1))
    for number, (earlier, later) in enumerate(pairwise(checked), start=2):
        if later.timestamp < earlier.timestamp:
            raise RowRefused(f"event {number} is before event {number - 1}; sort the events by time")
    return EventSequence(check_id(row, source), check_text(row["member"], "member"), checked, source)


def _event(event: Mapping[str, Any], where: str) -> Event:
    check_known(event.keys(), tuple(_COLUMNS.values()), where, "an event has item, action, timestamp and if need be value")
    timestamp = event.get("timestamp")
    if isinstance(timestamp, bool) or not isinstance(timestamp, int):
        raise RowRefused(f"{where}: timestamp is {kind_of(timestamp)}, expected whole seconds since 1970-01-01 UTC")
    if not 0 <= timestamp < MAX_TIMESTAMP:
        raise RowRefused(f"{where}: timestamp is {timestamp}, expected seconds since 1970-01-01 UTC (not milliseconds)")
    return Event(
        check_text(event.get("item"), f"{where}: item"),
        check_text(event.get("action"), f"{where}: action"),
        timestamp,
        None if event.get("value") is None else check_number(event["value"], f"{where}: value"),
    )

"""Labels of a row: what the output heads of a model should put out for it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lib.config.heads import NAME_PATTERN, HeadConfig
from lib.core.manifest import canonical_json
from lib.data.checks import RowRefused, check_number, check_object, check_text, parse_json, shown

MAX_NUMBER = 3.4e38
"""Greatest that a float32 holds."""
_EXPECTED = '{"<head>": value, ...}'


def check_labels(row: Mapping[str, Any]) -> str | None:
    """The row's `labels` as JSON, None where it has none: head -> a number, a label, or a list of them, one a token and null
    where a token has none. A null is no label, since tables have the heads of all rows."""
    value = row.get("labels")
    if value is None:
        return None
    if isinstance(value, str):
        value = parse_json(check_text(value, "labels"), "labels")
    found = {}
    for head, label in check_object(value, "labels", _EXPECTED).items():
        if not re.fullmatch(NAME_PATTERN, str(head)):
            raise RowRefused(f"labels has {shown(head)}, which can't be a head's name; use a-z, 0-9 and _")
        if label is not None:
            found[head] = _check_label(label, f"labels: {head}")
    return canonical_json(found) if found else None


def check_fit(labels: str | None, heads: Sequence[HeadConfig]) -> None:
    """Whether heads can be trained by a row.

    Args:
        labels: as `check_labels` gives them.
    Raises:
        RowRefused: a label of no head, of another kind than its head, or none where no head goes without.
    """
    given = {} if labels is None else parse_json(labels, "labels")
    known = {head.name: head for head in heads if head.kind != "lm"}
    if unknown := sorted(given.keys() - known.keys()):
        remedy = "name it in the heads (with weight 0 it is counted, not trained), or remove it"
        raise RowRefused(f"labels has {unknown[0]!r}, the heads with labels are {', '.join(known) or 'none'}; {remedy}")
    if not given and len(known) == len(heads):
        raise RowRefused(f"has no label for any of the heads {', '.join(known)}, so there is nothing to train")
    for name, value in given.items():
        if isinstance(value, list) and not known[name].by_token:
            raise RowRefused(f"labels: {name} is a list, but the head has one output for each document; give one value")
        _check_values(value if isinstance(value, list) else [value], known[name])


def _check_label(value: object, what: str) -> object:
    if isinstance(value, list):
        if not any(item is not None for item in value):
            raise RowRefused(f"{what} is a list without a value; give at least one, or leave it out")
        return [None if item is None else _check_value(item, f"{what}[{number}]") for number, item in enumerate(value)]
    return _check_value(value, what)


def _check_value(value: object, what: str) -> float | str:
    if isinstance(value, str):
        return check_text(value, what)
    number = check_number(value, what)
    if abs(number) > MAX_NUMBER:
        raise RowRefused(f"{what} is {number}, which 32 bits can't hold")
    return number


def _check_values(values: Iterable[float | str | None], head: HeadConfig) -> None:
    for value in values:
        if value is None:
            continue
        if head.kind == "classification" and value not in head.labels:
            shown_labels = ", ".join(head.labels[:8]) + (", ..." if len(head.labels) > 8 else "")
            raise RowRefused(f"labels: {head.name} is {shown(value)}; expected one of {shown_labels}")
        if head.kind == "scalar" and isinstance(value, str):
            raise RowRefused(f"labels: {head.name} is {shown(value)}, expected a number")
        if head.trained_by == "logistic" and not 0.0 <= float(value) <= 1.0:
            raise RowRefused(f"labels: {head.name} is {value}; the logistic loss takes 0 to 1")

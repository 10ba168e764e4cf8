"""What a field of a raw row must be. Nothing is corrected: a value is right or its row is refused."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

MAX_ID_CHARACTERS = 256


class RowRefused(Exception):
    """One row can't be used; the message is the reason, without the place."""


def check_object(value: object, what: str, expected: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RowRefused(f"{what} is {kind_of(value)}, expected {expected}".lstrip())
    return value


def check_list(value: object, what: str, expected: str) -> list[Any]:
    """A list that isn't empty."""
    if not isinstance(value, list) or not value:
        raise RowRefused(f"{what} is {kind_of(value)}, expected {expected}")
    return value


def check_known(keys: Collection[object], known: Collection[str], what: str, expected: str) -> None:
    """Raises RowRefused: a key that is not known; `expected` says which are."""
    unknown = sorted(str(key) for key in keys if key not in known)
    if unknown:
        raise RowRefused(f"{what} has unknown field {shown(unknown[0])}; {expected}".lstrip())


def check_id(row: Mapping[str, Any], source: str) -> str:
    """The row's own id, or its place where it has none."""
    value = row.get("id")
    if value is None:
        return source
    text = check_text(value, "id")
    if len(text) > MAX_ID_CHARACTERS or not text.isprintable():
        raise RowRefused(f"id {text[:40]!r} is longer than {MAX_ID_CHARACTERS} characters or not printable")
    return text


def check_answer(row: Mapping[str, Any]) -> str | None:
    return None if row.get("answer") is None else check_text(row["answer"], "answer")


def check_text(value: object, what: str, *, blank: bool = False) -> str:
    """Text that UTF-8 can hold; blank text only where `blank` allows it."""
    if not isinstance(value, str):
        raise RowRefused(f"{what} is {kind_of(value)}, expected text")
    if not blank and not value.strip():
        raise RowRefused(f"{what} is blank")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRefused(f"{what} holds half a surrogate pair at character {error.start}, which is no text") from error
    return value


def check_number(value: object, what: str) -> float:
    """A finite number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowRefused(f"{what} is {kind_of(value)}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowRefused(f"{what} is {value if isinstance(value, float) else 'too large'}, expected a finite number")
    return number


def json_text(value: object, what: str) -> str:
    """A JSON value as text: text must be JSON and stays as it is, anything else is written in its own order of keys.

    Raises:
        RowRefused: not JSON, or a null in an object: a table whose rows differ in their keys fills the missing ones with
            nulls, which can't be told from a null that was meant.
    """
    if isinstance(value, str):
        parse_json(check_text(value, what), what)
        return value
    if _holds_null(value):
        raise RowRefused(
            f"{what} holds a null, which may be a key that another row has and this one lacks; write it as JSON in a text"
        )
    try:
        return check_text(json.dumps(value, ensure_ascii=False, allow_nan=False), what)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowRefused(f"{what} is {kind_of(value)}, which JSON can't hold: {error}") from error


def parse_json(text: str, what: str) -> Any:
    """The value of a JSON text without NaN and without a key given twice."""
    try:
        return strict_json(text)
    except RecursionError as error:
        raise RowRefused(f"{what} is not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        raise RowRefused(f"{what} is not JSON ({error}): {shown(text)}") from error


def strict_json(text: str) -> Any:
    """Raises ValueError: not JSON, NaN or Infinity, or a key given twice; RecursionError: nested too deeply."""
    return _STRICT.decode(text)


def kind_of(value: Any) -> str:
    """How a value of the wrong kind is named in a reason."""
    if value is None:
        return "missing or null"
    if isinstance(value, Mapping | list | str) and not value:
        return f"an empty {type(value).__name__}"
    return f"of type {type(value).__name__} ({shown(value)})"


def shown(value: object) -> str:
    """A value's beginning, in ASCII."""
    try:
        return ascii(value)[:60]
    except (RecursionError, ValueError):
        return "too deep or too long to be shown"


def _holds_null(value: object) -> bool:
    pending = [value]
    while pending:
        inner = pending.pop()
        if isinstance(inner, Mapping):
            if any(item is None for item in inner.values()):
                return True
            pending += inner.values()
        elif isinstance(inner, list):
            pending += inner
    return False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"field {twice!r} is given twice")
    return values


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_refuse_twice)
"""Made once: json.loads makes one in each call that has options."""

"""Reading off a template's renderings where it puts values and what it does to them."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from lib.tokens.layout import FormatRefused, Layout, Segment, Slot, Strip

Mark = Callable[[Slot], str]

_OPEN, _CLOSE = "\ue0d1", "\ue0d2"
_MARK = re.compile(rf'\{{"{_OPEN}(\d+)\.([a-z _]+)\.(\d+){_CLOSE}": 0\}}|{_OPEN}(\d+)\.([a-z _]+)\.(\d+){_CLOSE}')
_PADS = (("\x0b", "\x0c\x0c"), ("\n", "\n\n"), (" ", "  "))
"""White space put before and after every mark; by their lengths, what is left of it tells which side was kept."""
_TAIL = '"' + " Long text" * 400 + "."
"""Put after every mark: shows what is written as JSON, and what is cut or changed."""
_KEPT: dict[tuple[bool, bool, bool], Strip] = {
    (True, True, True): "",
    (False, False, False): "white",
    (True, False, True): "\n",
    (True, True, False): " ",
}
"""(other white space, newlines, spaces) kept -> what is stripped."""


def read_slots(render: Callable[[Mark], str]) -> Layout:
    """The layout of the conversation that `render` writes with the values it is given for slots.

    Raises:
        FormatRefused: a value is changed in a way that isn't known.
    """
    fixed, slots = _split(render(_mark))
    in_json = _slots_in_json(fixed, slots, _split(render(_Padding(("", _TAIL), frozenset()))))
    kept = [_kept_ends(fixed, slots, _split(render(_Padding(pads, in_json)))) for pads in _PADS]
    parts: list[Segment] = [Segment(fixed[0])] if fixed[0] else []
    for number, (slot, after) in enumerate(zip(slots, fixed[1:])):
        if slot not in in_json and slot.field != "call arguments":
            left, right = (_KEPT.get(tuple(ends[number][side] for ends in kept)) for side in (0, 1))  # type: ignore[arg-type]
            if left is None or right is None:
                raise FormatRefused("the chat template strips characters from what messages say in a way that isn't known")
            slot = replace(slot, left=left, right=right)  # noqa: PLW2901 - the same slot, known better
        parts.append(Segment(replace(slot, in_json=slot in in_json)))
        if after:
            parts.append(Segment(after))
    return tuple(parts)


def _slots_in_json(fixed: list[str], slots: list[Slot], tailed: tuple[list[str], list[Slot]]) -> frozenset[Slot]:
    """The slots whose quotes are escaped; refuses values that are cut or changed."""
    found, same = tailed
    in_json = set()
    if same != slots:
        raise FormatRefused("the chat template cuts or changes what messages say")
    for slot, plain, after in zip(slots, fixed[1:], found[1:]):
        if slot.field == "call arguments":
            continue
        if after not in {_TAIL + plain, json.dumps(_TAIL)[1:-1] + plain}:
            raise FormatRefused("the chat template cuts or changes what messages say")
        if not after.startswith(_TAIL):
            in_json.add(slot)
    return frozenset(in_json)


def _mark(slot: Slot) -> str:
    text = f"{_OPEN}{slot.message}.{slot.field}.{slot.call}{_CLOSE}"
    return f'{{"{text}": 0}}' if slot.field == "call arguments" else text


@dataclass(frozen=True)
class _Padding:
    """Marks with text before and after, but for slots that are in JSON and arguments, which can't hold any."""

    pads: tuple[str, str]
    in_json: frozenset[Slot]

    def __call__(self, slot: Slot) -> str:
        if slot in self.in_json or slot.field == "call arguments":
            return _mark(slot)
        return self.pads[0] + _mark(slot) + self.pads[1]


def _split(text: str) -> tuple[list[str], list[Slot]]:
    """(fixed texts, the slots between them)."""
    fixed, slots, start = [], [], 0
    for match in _MARK.finditer(text):
        message, field, call = match.group(1, 2, 3) if match[1] else match.group(4, 5, 6)
        if (field == "call arguments") != bool(match[1]):
            raise FormatRefused("the chat template writes the arguments of a call in another form than JSON on one line")
        fixed.append(text[start : match.start()])
        slots.append(Slot(int(message), field, int(call)))  # type: ignore[arg-type]
        start = match.end()
    fixed.append(text[start:])
    if any(mark in piece for piece in fixed for mark in (_OPEN, _CLOSE)):
        raise FormatRefused("the chat template cuts into what messages say")
    return fixed, slots


def _kept_ends(fixed: list[str], slots: list[Slot], padded: tuple[list[str], list[Slot]]) -> list[tuple[bool, bool]]:
    """For each slot, whether the padding before it and after it is still there."""
    found, same = padded
    if same != slots:
        raise FormatRefused("the chat template writes other parts when a message has white space at its ends")
    extra = [len(after) - len(before) for before, after in zip(fixed, found)]
    if any(number not in {0, 1, 2, 3} for number in extra):
        raise FormatRefused("the chat template changes white space around what messages say")
    return [(before % 2 == 1, after >= 2) for before, after in itertools.pairwise(extra)]

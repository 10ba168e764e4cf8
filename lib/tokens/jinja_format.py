"""The tokenizer's own chat template as a format: its layouts are read off renderings of marked values.

Every value of a message is replaced by a mark that no text holds; what the template wrote around the marks is fixed text.
Marks with white space or a quote beside them show what the template strips and what it writes as JSON.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date as Day
from typing import Any, get_args

from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lib.core.errors import TokenizerError
from lib.core.examples import Message
from lib.tokens.jinja_reading import read_slots
from lib.tokens.layout import FormatRefused, Layout, Segment, Shape, Slot, Strip, Turn, text_of, value_of
from lib.tokens.sandbox_child import Generation
from lib.tokens.tokenizer import TEMPLATE_ERRORS, TOOL_TURN_ENDS, Tokenizer, turn_end

_THINKING_NAMES = ("reasoning_content", "thinking", "reasoning")
_THINK_BLOCK = re.compile(r"<think>\s*</think>\s*")
_THINK_END = re.compile(r".*?</think>\s*", re.DOTALL)


class JinjaFormat:
    """Layouts of one tokenizer's chat template."""

    def __init__(self, tokenizer: Tokenizer, date: str | None) -> None:
        """Raises TokenizerError when the template's turns can't be told from what is around them; says why."""
        self._tokenizer = tokenizer
        source = tokenizer.template or ""
        self._variables: dict[str, Any] = {"strftime_now": lambda form: _date_text(date, form)} if date else {}
        self._thinking_name = next((name for name in _THINKING_NAMES if re.search(rf"\b{name}\b", source)), None)
        self._contained, self._equal = _texts_that_matter(source)
        self._end = turn_end(tokenizer)
        try:
            self._refuse_dates(date)
            self._headers = self._find_header()
        except FormatRefused as refused:
            raise TokenizerError(f"{tokenizer.folder}: {refused}; use another template or config.data.chat_format") from refused

    def stop_texts(self) -> tuple[str, ...]:
        return (self._end, *(token for token in TOOL_TURN_ENDS if token in self._tokenizer.control_tokens))

    def special(self, text: str) -> bool:
        if text[:1].isspace() and not text.strip():
            return True
        return text in self._equal or (self._contained is not None and self._contained.search(text) is not None)

    def reference(self, shape: Shape, messages: Sequence[Message]) -> str:
        return self._render(shape, lambda slot: value_of(slot, messages))

    def layout(self, shape: Shape) -> Layout:
        found = read_slots(lambda mark: self._render(shape, mark))
        self._refuse_losses(shape, found)
        return self._with_turns(shape, found)

    def exact_layout(self, shape: Shape, messages: Sequence[Message]) -> Layout:
        layout, text = self.layout(shape), self.reference(shape, messages)
        found = _matched(layout, text, messages)
        if found is None:
            raise FormatRefused("the chat template changes what its messages say, so what would be trained can't be told")
        return found

    def _render(self, shape: Shape, value: Any) -> str:
        messages = [_as_dict(turn, number, value, self._thinking_name) for number, turn in enumerate(shape.turns)]
        tools = [json.loads(tool) for tool in shape.tools] or None
        try:
            return self._tokenizer.render(messages, tools=tools, add_generation_prompt=shape.generation, **self._variables)
        except TEMPLATE_ERRORS as error:
            raise FormatRefused(f"the chat template does not take this conversation: {error}") from error

    def _find_header(self) -> tuple[str, ...]:
        """What a generation prompt adds to a rendering: the header of the assistant's turn."""
        turns = Shape((Turn("user"),))
        plain, prompt = (self._render(shape, _words) for shape in (turns, turns._replace(generation=True)))
        header = prompt[len(plain) :]
        if not header or not prompt.startswith(plain):
            raise TokenizerError(
                f"{self._tokenizer.folder}: the chat template adds no header for the assistant's turn when asked for a "
                "generation prompt, so where an answer begins can't be told; add `{% if add_generation_prompt %}` to it"
            )
        # Templates of models that always think open the thinking block in the prompt, and not in earlier turns.
        return tuple(dict.fromkeys((header, header.partition("<think>")[0])))

    def _refuse_dates(self, date: str | None) -> None:
        if date is not None or "strftime_now" not in (self._tokenizer.template or ""):
            return
        shape = Shape((Turn("user"),), generation=True)
        texts = []
        for day in ("2001-02-03", "2024-07-26"):
            self._variables = {"strftime_now": lambda form, day=day: _date_text(day, form)}
            texts.append(self._render(shape, _words))
        self._variables = {}
        if texts[0] != texts[1]:
            raise TokenizerError(
                f"{self._tokenizer.folder}: the chat template writes today's date, so the same row would be another text "
                "tomorrow; set config.data.template_date"
            )

    def _refuse_losses(self, shape: Shape, found: Layout) -> None:
        """Whatever a row says must be in the text; only thinking may be left out, by templates that know of it."""
        slots = {(part.text.message, part.text.field) for part in found if isinstance(part.text, Slot)}
        text = "".join(part.text for part in found if isinstance(part.text, str))
        for number, turn in enumerate(shape.turns):
            wanted = [("content", turn.has_content), ("call name", turn.calls_with_id), ("call arguments", turn.calls_with_id)]
            lost = [field for field, there in wanted if there and (number, field) not in slots]
            if lost:
                raise FormatRefused(f"the chat template leaves out the {lost[0]} of message {number + 1} ({turn.role})")
            if turn.has_thinking and self._thinking_name is None:
                raise FormatRefused(f"message {number + 1} has thinking, and the chat template knows of none")
        for tool in shape.tools:
            name = _tool_name(tool)
            if name not in text:
                raise FormatRefused(f"the chat template leaves out the tool {name!r} that the row offers")

    def _with_turns(self, shape: Shape, found: Layout) -> Layout:
        """The layout with the text of each assistant's turn marked: what follows its header, to the end of the turn."""
        starts = list(itertools.accumulate((_length(part) for part in found), initial=0))
        text = "".join(part.text if isinstance(part.text, str) else "\0" for part in found)
        regions: list[tuple[int, int, int, int]] = []
        owners = [(begin, part.text.message) for begin, part in zip(starts, found) if isinstance(part.text, Slot)]
        for number, turn in enumerate(shape.turns):
            own = [begin for begin, message in owners if message == number]
            if turn.role != "assistant" or not own:
                continue
            before = max((begin + 1 for begin, message in owners if begin < own[0] and message != number), default=0)
            after = min((begin for begin, message in owners if begin > own[-1]), default=len(text))
            regions.append((number, *self._region(text, (before, own[0]), (own[-1] + 1, after), number)))
        return _cut(found, starts, regions)

    def _region(self, text: str, head: tuple[int, int], tail: tuple[int, int], number: int) -> tuple[int, int, int]:
        """(start, end of thinking, end) of a turn's text."""
        places = [(text.rfind(header, *head), len(header)) for header in self._headers]
        start = next((place + length for place, length in places if place >= 0), -1)
        ends = [(place, end) for end in self.stop_texts() if (place := text.find(end, *tail)) >= 0]
        if start < 0 or not ends:
            what = "begins with another header than a generation prompt" if start < 0 else "is not closed by a token of its own"
            raise FormatRefused(f"the turn of message {number + 1} (assistant) {what}")
        place, end = min(ends)
        stop = place + len(end)
        block = _THINK_BLOCK.match(text, start, stop) or _THINK_END.match(text, start, stop)
        return start, block.end() if block else start, stop


def _cut(found: Layout, starts: Sequence[int], regions: Sequence[tuple[int, int, int, int]]) -> Layout:
    """Segments cut where regions begin and end."""
    borders = sorted({border for _, *places in regions for border in places})
    segments = []
    for part, start in zip(found, starts):
        stop = start + _length(part)
        places = [start, *(border for border in borders if start < border < stop), stop]
        for begin, end in itertools.pairwise(places):
            number, think = next(((n, m) for n, a, m, b in regions if a <= begin and end <= b), (None, 0))
            text = part.text[begin - start : end - start] if isinstance(part.text, str) else part.text
            segments.append(Segment(text, number, number is not None and end <= think))
    return tuple(segments)


def _matched(layout: Layout, text: str, messages: Sequence[Message]) -> Layout | None:
    """The layout with its slots stripped as this rendering shows, or None where none of the ways gives the text."""
    slots = {number: part.text for number, part in enumerate(layout) if isinstance(part.text, Slot)}
    done: list[Segment] = []

    def place(number: int, start: int) -> bool:
        if number == len(layout):
            return start == len(text)
        part = layout[number]
        candidates = [replace(part, text=slot) for slot in _strippings(slots[number])] if number in slots else [part]
        tried = set()
        for candidate in candidates:
            written = candidate.text if isinstance(candidate.text, str) else value_of(candidate.text, messages)
            if written not in tried and text.startswith(written, start):
                tried.add(written)
                done.append(candidate)
                if place(number + 1, start + len(written)):
                    return True
                done.pop()
        return False

    if place(0, 0) and text_of(tuple(done), messages) == text:
        return tuple(done)
    return None


def _strippings(slot: Slot) -> list[Slot]:
    ways: tuple[Strip, ...] = get_args(Strip)
    others = [replace(slot, left=left, right=right) for left in ways for right in ways]
    return [slot, *others]


def _texts_that_matter(source: str) -> tuple[re.Pattern[str] | None, frozenset[str]]:
    """Texts that the template looks for in what messages say: (within them, as the whole of them)."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    contained: set[str] = set()
    equal: set[str] = set()
    tree = environment.parse(source)
    for compare in tree.find_all(nodes.Compare):
        found = equal if all(operand.op in {"eq", "ne"} for operand in compare.ops) else contained
        found.update(_constants([compare.expr, *(operand.expr for operand in compare.ops)]))
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr not in {"strip", "lstrip", "rstrip"}:
            contained.update(_constants(call.args))
    for used in tree.find_all(nodes.Filter):
        if used.name == "replace":
            contained.update(_constants(used.args))
    pattern = "|".join(re.escape(text) for text in sorted(contained, key=len, reverse=True) if text)
    return (re.compile(pattern) if pattern else None), frozenset(equal)


def _constants(expressions: Sequence[nodes.Node]) -> list[str]:
    found = []
    for expression in expressions:
        every = [expression] if isinstance(expression, nodes.Const) else expression.find_all(nodes.Const)
        found += [constant.value for constant in every if isinstance(constant.value, str)]
    return found


def _as_dict(turn: Turn, number: int, value: Any, thinking_name: str | None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": value(Slot(number, "content")) if turn.has_content else ""}
    if turn.has_thinking and thinking_name:
        message[thinking_name] = value(Slot(number, "thinking"))
    if turn.has_name:
        message["name"] = value(Slot(number, "name"))
    if turn.has_call_id:
        message["tool_call_id"] = value(Slot(number, "call_id"))
    if turn.calls_with_id:
        message["tool_calls"] = [_call(number, index, has_id, value) for index, has_id in enumerate(turn.calls_with_id)]
    return message


def _call(number: int, index: int, has_id: bool, value: Any) -> dict[str, Any]:
    arguments = json.loads(value(Slot(number, "call arguments", index)))
    function = {"name": value(Slot(number, "call name", index)), "arguments": arguments}
    identity = {"id": value(Slot(number, "call own id", index))} if has_id else {}
    return {"type": "function", **identity, "function": function}


def _tool_name(tool: str) -> str:
    value = json.loads(tool)
    return str(value.get("function", value).get("name"))


def _words(slot: Slot) -> str:
    return "words"


def _length(part: Segment) -> int:
    return len(part.text) if isinstance(part.text, str) else 1


def _date_text(day: str | None, form: str) -> str:
    return Day.fromisoformat(day or "").strftime(form)

"""Laws of layouts: each row becomes the example written beside it; one layout fits a source, or none is taken."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config.rows import RowsConfig
from lib.core.errors import DataError
from lib.core.examples import (
    Completion,
    Conversation,
    Event,
    EventSequence,
    Example,
    Message,
    PreferencePair,
    Prompt,
    ToolCall,
)
from lib.data.checks import RowRefused
from lib.data.schemas.layouts import KINDS, LAYOUTS, Layout, find_layout
from lib.data.sources import RawRow, Split, open_source

P = "f:1"
ANY = RowsConfig(kind="")
KEYS = ("role", "content", "from", "value", "function", "name", "arguments", "tool_calls", "prompt", "messages", "events", "id")
U, A, S = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "system", "content": "s"}
USER, ANSWER, SYSTEM = Message("user", "q"), Message("assistant", "a"), Message("system", "s")
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
WEATHER_TEXT = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'


def call(arguments: Any, call_id: str | None = "c1", name: str = "weather") -> dict[str, Any]:
    value = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return value if call_id is None else value | {"id": call_id}


def calling(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content: str = "sun", call_id: str | None = "c1", name: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id, "name": name}


CITY = ToolCall("weather", '{"city": "Bonn"}', "c1")

GOOD: dict[str, tuple[str, dict[str, Any], Example]] = {
    "messages": ("messages", {"messages": [U, A]}, Conversation(P, (USER, ANSWER), P)),
    "system first": ("messages", {"messages": [S, U, A, U, A]}, Conversation(P, (SYSTEM, USER, ANSWER, USER, ANSWER), P)),
    "developer first": (
        "messages",
        {"messages": [{"role": "developer", "content": "s"}, U, A]},
        Conversation(P, (Message("developer", "s"), USER, ANSWER), P),
    ),
    "id and answer": (
        "messages",
        {"messages": [U, A], "id": "x", "answer": "42"},
        Conversation("x", (USER, ANSWER), P, "42"),
    ),
    "thinking": (
        "messages",
        {"messages": [U, A | {"thinking": "hm"}, U, A | {"reasoning_content": "so"}]},
        Conversation(P, (USER, Message("assistant", "a", "hm"), USER, Message("assistant", "a", "so")), P),
    ),
    "weights": (
        "messages",
        {"messages": [U, A | {"weight": 0}, U, A | {"weight": 2.5}]},
        Conversation(P, (USER, Message("assistant", "a", weight=0.0), USER, Message("assistant", "a", weight=2.5)), P),
    ),
    "a call and its result": (
        "messages",
        {"messages": [U, calling(call({"city": "Bonn"})), result(), A], "tools": [WEATHER]},
        Conversation(
            P,
            (USER, Message("assistant", "", tool_calls=(CITY,)), Message("tool", "sun", call_id="c1"), ANSWER),
            P,
            tools=(WEATHER_TEXT,),
        ),
    ),
    "two calls answered in the other order": (
        "messages",
        {"messages": [U, calling(call("{}", "c1"), call("{}", "c2"), content="x"), result("", "c2"), result("y", "c1"), A]},
        Conversation(
            P,
            (
                USER,
                Message("assistant", "x", tool_calls=(ToolCall("weather", "{}", "c1"), ToolCall("weather", "{}", "c2"))),
                Message("tool", "", call_id="c2"),
                Message("tool", "y", call_id="c1"),
                ANSWER,
            ),
            P,
        ),
    ),
    "calls without ids, as text that stays as it is": (
        "messages",
        {"messages": [U, calling({"name": "weather", "arguments": '{ "a" :null}'}), result(call_id=None, name="weather"), A]},
        Conversation(
            P,
            (
                USER,
                Message("assistant", "", tool_calls=(ToolCall("weather", '{ "a" :null}'),)),
                Message("tool", "sun", name="weather"),
                ANSWER,
            ),
            P,
        ),
    ),
    "ends with a call": (
        "messages",
        {"messages": [U, calling(call({"city": "Bonn"}))]},
        Conversation(P, (USER, Message("assistant", "", tool_calls=(CITY,))), P),
    ),
    "nulls and empty lists where a table has no value": (
        "messages",
        {
            "messages": [
                {**message, "thinking": None, "tool_calls": calls, "weight": None, "name": None, "tool_call_id": None}
                for message, calls in ((U, []), (A, None))
            ],
            "tools": None,
            "id": None,
            "answer": None,
        },
        Conversation(P, (USER, ANSWER), P),
    ),
    "tools as text, nulls meant": (
        "messages",
        {"messages": [U, A], "tools": '[{"name": "f", "default": null}]'},
        Conversation(P, (USER, ANSWER), P, tools=('{"name": "f", "default": null}',)),
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        Conversation(P, (SYSTEM, USER, ANSWER), P),
    ),
    "sharegpt with a call": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
                {"from": "observation", "value": "sun"},
                {"from": "gpt", "value": "a"},
            ],
            "system": "",
            "tools": json.dumps([WEATHER]),
        },
        Conversation(
            P,
            (
                SYSTEM,
                USER,
                Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Bonn"}'),)),
                Message("tool", "sun"),
                ANSWER,
            ),
            P,
            tools=(WEATHER_TEXT,),
        ),
    ),
    "alpaca": ("alpaca", {"instruction": "q", "input": "", "output": "a"}, Conversation(P, (USER, ANSWER), P)),
    "alpaca with all": (
        "alpaca",
        {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q", "a"]]},
        Conversation(P, (SYSTEM, USER, ANSWER, Message("user", "q\n\ni"), ANSWER), P),
    ),
    "completion of messages": (
        "completion_messages",
        {"prompt": [U, A, U], "completion": [A]},
        Conversation(P, (USER, Message("assistant", "a", weight=0.0), USER, ANSWER), P),
    ),
    "completion": ("completion", {"prompt": "1+1=", "completion": "2"}, Completion(P, "1+1=", "2", P)),
    "completion without a prompt": (
        "completion",
        {"prompt": "", "completion": " 2", "answer": "2"},
        Completion(P, "", " 2", P, "2"),
    ),
    "text": ("text", {"text": "once", "id": "t"}, Completion("t", "", "once", P)),
    "preference of texts": (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1},
        PreferencePair(P, (USER,), (ANSWER,), (Message("assistant", "b"),), P, 1.0),
    ),
    "preference of answers as messages": (
        "preference",
        {"prompt": [S, U], "chosen": [A], "rejected": [A | {"content": "b"}]},
        PreferencePair(P, (SYSTEM, USER), (ANSWER,), (Message("assistant", "b"),), P),
    ),
    "preference of whole conversations beside their prompt": (
        "preference",
        {"prompt": "q", "chosen": [U, A], "rejected": [U, A | {"content": "b"}], "score_chosen": 3.5, "score_rejected": 1},
        PreferencePair(P, (USER,), (ANSWER,), (Message("assistant", "b"),), P, 2.5),
    ),
    "preference of whole conversations": (
        "preference",
        {"chosen": [U, A, U, A], "rejected": [U, A, U, A | {"content": "b"}]},
        PreferencePair(P, (USER, ANSWER, USER), (ANSWER,), (Message("assistant", "b"),), P),
    ),
    "prompt with an answer": (
        "prompt",
        {"prompt": "q", "verifier": "exact", "answer": "é"},
        Prompt(P, (USER,), P, "exact", '{"answer": "é"}'),
    ),
    "prompt with a payload": (
        "prompt",
        {"prompt": [S, U], "verifier": "code", "payload": {"tests": ["t"], "limit": 3}, "tools": [WEATHER]},
        Prompt(P, (SYSTEM, USER), P, "code", '{"tests": ["t"], "limit": 3}', (WEATHER_TEXT,)),
    ),
    "prompt with a payload as text": (
        "prompt",
        {"prompt": "q", "verifier": "code", "payload": '{"a":null}'},
        Prompt(P, (USER,), P, "code", '{"a":null}'),
    ),
    "events": (
        "events",
        {
            "member": "m",
            "events": [
                {"item": "i1", "action": "play", "timestamp": 5},
                {"item": "i2", "action": "rate", "timestamp": 5, "value": 4},
            ],
        },
        EventSequence(P, "m", (Event("i1", "play", 5), Event("i2", "rate", 5, 4.0)), P),
    ),
    "event columns": (
        "event_columns",
        {"member": "m", "items": ["i1", "i2"], "actions": ["play", "rate"], "timestamps": [5, 6], "values": [None, 4.5]},
        EventSequence(P, "m", (Event("i1", "play", 5), Event("i2", "rate", 6, 4.5)), P),
    ),
}


class Rows:
    """A source in memory."""

    digest, num_files = "memory", 1

    def __init__(self, *values: object) -> None:
        self.values = values
        self.splits: Sequence[Split] = [Split("f", 0, 1)]

    def read(self, split: int, start: int = 0, step: int = 1) -> Iterator[RawRow]:
        return iter([RawRow(f"f:{number}", value) for number, value in enumerate(self.values, start=1)][start::step])


@pytest.mark.parametrize(("layout", "row", "example"), GOOD.values(), ids=GOOD.keys())
def test_a_row_becomes_the_example_it_stands_for(layout: str, row: dict[str, Any], example: Example) -> None:
    """And the layout is found by its columns, among all kinds and among its own."""
    found = find_layout(Rows(row), ANY)
    assert found.name == layout
    assert find_layout(Rows(row), RowsConfig(kind=found.kind)) == found
    assert found.check(row, P) == example


@pytest.mark.parametrize(("layout", "row", "example"), GOOD.values(), ids=GOOD.keys())
def test_a_table_gives_the_same_example_as_a_line(tmp_path: Path, layout: str, row: dict[str, Any], example: Example) -> None:
    """[M15] Parquet fills absent keys with nulls; the example is the same, read alone and beside rows with all keys."""
    known = next(known for known in LAYOUTS if known.name == layout)
    for other in [row, *(other for name, other, _ in GOOD.values() if name == layout)]:
        names = [*row, *(other.keys() - row.keys())]
        try:
            table = pa.table({name: [row.get(name), other.get(name)] for name in names})
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # one column can't hold both forms of a value
            continue
        pq.write_table(table, tmp_path / "f.parquet")
        value = next(iter(open_source(tmp_path / "f.parquet").read(0))).value
        try:
            assert known.check(value, P) == example
        except RowRefused as refused:  # objects to which the table has added keys are refused, never taken
            assert "holds a null" in str(refused) and other != row


def test_every_layout_and_kind_has_an_example() -> None:
    assert {layout for layout, _, _ in GOOD.values()} == {layout.name for layout in LAYOUTS}
    assert {layout.kind for layout in LAYOUTS} == set(KINDS)


def test_the_first_row_that_fits_decides() -> None:
    """Rows that can't be read or fit nothing are passed over; the layout then refuses them one by one."""
    found = find_layout(Rows(7, {"mess": 1}, {"messages": [U, A]}, {"conversations": []}), ANY)
    assert found.name == "messages"
    with pytest.raises(RowRefused, match="unknown field 'conversations'; a row of the layout 'messages' has messages"):
        found.check({"conversations": []}, P)


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"question": "q", "response": "a"}, {}, "f:1: has columns question, response, which fit no layout"),
        ({"messages": [], "score": 1}, {}, "which are those of 'messages' and the unknown score"),
        ({"prompt": 1, "completion": 2}, {}, "but not the types of any of completion_messages, completion"),
        (
            {"messages": []},
            {"kind": "events"},
            r"messages, which fit no layout.*\n  events \(events\): member, events \(and id",
        ),
        ([1], {}, "is of type list, expected an object; none of the first 100 rows"),
        ({}, {}, "has columns of no name"),
        ({"messages": []}, {"layout": "openai"}, "there is no layout 'openai' for any kind; kinds are conversation"),
        ({"messages": []}, {"kind": "prompt", "layout": "messages"}, "there is no layout 'messages' for prompt"),
    ],
)
def test_columns_that_fit_nothing_are_refused_with_what_would(row: object, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        find_layout(Rows(row), RowsConfig(**{"kind": "", **options}))


def test_columns_can_be_ignored_by_name_only() -> None:
    row = {"instruction": "q", "input": "", "output": "a", "text": "q a", "score": 0.5}
    found = find_layout(Rows(row), RowsConfig(ignored=("text", "score")))
    assert found.check(row, P) == Conversation(P, (USER, ANSWER), P)
    with pytest.raises(RowRefused, match="unknown field 'more'"):
        found.check(row | {"more": 1}, P)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "call without a result": (
        "messages",
        {"messages": [U, calling(call("{}")), A]},
        "expected the result of the call of 'weather'",
    ),
    "result without a call": ("messages", {"messages": [U, A, result(), A]}, "message 3 is of the tool, expected of the user"),
    "result of another id": (
        "messages",
        {"messages": [U, calling(call("{}")), result(call_id="c9"), A]},
        "'c9'; the calls that wait",
    ),
    "result without the id": ("messages", {"messages": [U, calling(call("{}")), result(call_id=None), A]}, "no tool_call_id"),
    "result twice": ("messages", {"messages": [U, calling(call("{}")), result(), result(), A]}, "message 4 is of the tool"),
    "result of another tool": (
        "messages",
        {"messages": [U, calling(call("{}")), result(name="time"), A]},
        "a result of 'time', but the call it answers is of 'weather'",
    ),
    "ids given to some calls": (
        "messages",
        {"messages": [U, calling(call("{}"), call("{}", None))]},
        "calls with an id and calls",
    ),
    "one id twice": ("messages", {"messages": [U, calling(call("{}"), call("{}"))]}, "two calls of the same id"),
    "ends with a result": ("messages", {"messages": [U, calling(call("{}")), result()]}, "ends with a message of the tool"),
    "arguments missing": ("messages", {"messages": [U, calling({"name": "f"})]}, "call 1: arguments is missing or null"),
    "arguments no JSON": ("messages", {"messages": [U, calling(call("{city: Bonn}"))]}, "call 1: arguments is not JSON"),
    "arguments a list": ("messages", {"messages": [U, calling(call("[1]"))]}, "expected an object of arguments"),
    "arguments with NaN": ("messages", {"messages": [U, calling(call('{"x": NaN}'))]}, "NaN is not a JSON value"),
    "arguments with a key twice": ("messages", {"messages": [U, calling(call('{"x": 1, "x": 2}'))]}, "'x' is given twice"),
    "arguments with a null of a table": (
        "messages",
        {"messages": [U, calling(call({"a": 1, "b": None}))]},
        "holds a null, which may",
    ),
    "a null deep within": ("messages", {"messages": [U, calling(call({"a": [{"b": None}]}))]}, "holds a null"),
    "call a text": ("messages", {"messages": [U, calling("weather")]}, "call 1 is of type str"),  # type: ignore[arg-type]
    "call of another type": (
        "messages",
        {"messages": [U, calling(call("{}") | {"type": "code"})]},
        "only functions can be called",
    ),
    "call with more": ("messages", {"messages": [U, calling(call("{}") | {"x": 1})]}, "call 1 has unknown field 'x'"),
    "call without a name": ("messages", {"messages": [U, calling(call("{}", name=""))]}, "name is blank"),
    "call of a tool not offered": (
        "messages",
        {"messages": [U, calling(call("{}", name="f"))], "tools": [WEATHER]},
        "message 2 calls 'f', which is not among the tools: weather",
    ),
    "tools a number": ("messages", {"messages": [U, A], "tools": 3}, "tools is of type int"),
    "tools no JSON": ("messages", {"messages": [U, A], "tools": "weather"}, "tools is not JSON"),
    "tool without a name": ("messages", {"messages": [U, A], "tools": [{"function": {}}]}, "tool 1: name is missing or null"),
    "tool twice": ("messages", {"messages": [U, A], "tools": [WEATHER, WEATHER]}, "two functions of the name 'weather'"),
    "tool with a null of a table": ("messages", {"messages": [U, A], "tools": [WEATHER | {"x": None}]}, "tool 1 holds a null"),
    "content null without calls": ("messages", {"messages": [U, calling()]}, r"\(assistant\): content is missing or null"),
    "thinking of a user": ("messages", {"messages": [U | {"thinking": "x"}, A]}, "'thinking', which a message of role user"),
    "thinking blank": ("messages", {"messages": [U, A | {"thinking": " "}]}, "thinking is blank"),
    "thinking twice": (
        "messages",
        {"messages": [U, A | {"thinking": "x", "reasoning_content": "x"}]},
        "two names of one thing",
    ),
    "weight below 0": ("messages", {"messages": [U, A | {"weight": -1}]}, "weight is -1.0, expected 0 or more"),
    "weight NaN": ("messages", {"messages": [U, A | {"weight": float("nan")}]}, "weight is nan, expected a finite number"),
    "weight true": ("messages", {"messages": [U, A | {"weight": True}]}, "weight is of type bool"),
    "weight without end": ("messages", {"messages": [U, A | {"weight": 10**400}]}, "weight is too large"),
    "from unknown": (
        "sharegpt",
        {"conversations": [{"from": "bot", "value": "x"}]},
        "message 1 is from 'bot'; expected one of system",
    ),
    "value missing": ("sharegpt", {"conversations": [{"from": "human"}]}, "message 1 has no 'value'"),
    "value null": ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "value is missing or null"),
    "turn with more": ("sharegpt", {"conversations": [{"from": "human", "value": "q", "x": 1}]}, "unknown field 'x'"),
    "function_call no JSON": ("sharegpt", {"conversations": [{"from": "function_call", "value": "f()"}]}, "value is not JSON"),
    "system twice": (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}], "system": "s"},
        "no assistant message",
    ),
    "two humans": (
        "sharegpt",
        {"conversations": [{"from": who, "value": "x"} for who in ("human", "human", "gpt")]},
        "message 2 is of the user, expected of the assistant",
    ),
    "output blank": ("alpaca", {"instruction": "q", "output": " "}, "output is blank"),
    "instruction null": ("alpaca", {"instruction": None, "output": "a"}, "instruction is missing or null"),
    "input a number": ("alpaca", {"instruction": "q", "output": "a", "input": 0.5}, "input is of type float"),
    "history of texts": ("alpaca", {"instruction": "q", "output": "a", "history": ["x"]}, "expected .question, answer."),
    "completion by the user": (
        "completion_messages",
        {"prompt": [U], "completion": [U]},
        "completion begins with a message of the user",
    ),
    "prompt ends with the assistant": (
        "completion_messages",
        {"prompt": [U, A], "completion": [A]},
        "message 3 is of the assistant",
    ),
    "completion blank": ("completion", {"prompt": "x", "completion": ""}, "completion is blank"),
    "prompt a number": ("completion", {"prompt": 3, "completion": "x"}, "prompt is of type int"),
    "text null": ("text", {"text": None}, "text is missing or null"),
    "half a pair in text": ("text", {"text": "a\ud800"}, "half a surrogate pair at character 1"),
    "same answers": ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    "texts without a prompt": ("preference", {"chosen": "a", "rejected": "b"}, "texts don't say where the prompt ends"),
    "nothing in common": ("preference", {"chosen": [U, A], "rejected": [S, U, A]}, "no first message in common"),
    "questions differ": (
        "preference",
        {"chosen": [S, U, A], "rejected": [S, U | {"content": "r"}, A]},
        "the prompt ends with a message of the system",
    ),
    "prompt that is answered": (
        "preference",
        {"prompt": [U, A], "chosen": [A], "rejected": [U]},
        "ends with a message of the assistant",
    ),
    "chosen by the user": (
        "preference",
        {"prompt": "q", "chosen": [U], "rejected": "b"},
        "prompt and chosen: has no assistant",
    ),
    "chosen null": ("preference", {"prompt": "q", "chosen": None, "rejected": "b"}, "chosen is missing or null"),
    "chosen a number": ("preference", {"prompt": "q", "chosen": 1, "rejected": "b"}, "chosen is of type int"),
    "worse is chosen": (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": -1},
        "rejected is better than chosen by 1.0",
    ),
    "one score": ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1}, "or none of them"),
    "margin a text": ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1"}, "margin is of type str"),
    "no payload": ("prompt", {"prompt": "q", "verifier": "exact"}, "has neither payload nor answer"),
    "payload and answer": (
        "prompt",
        {"prompt": "q", "verifier": "exact", "answer": "1", "payload": "1"},
        "has payload and answer",
    ),
    "payload no JSON": ("prompt", {"prompt": "q", "verifier": "exact", "payload": "forty-two"}, "payload is not JSON"),
    "payload with NaN": ("prompt", {"prompt": "q", "verifier": "exact", "payload": {"x": float("nan")}}, "JSON can't hold"),
    "payload of bytes": ("prompt", {"prompt": "q", "verifier": "exact", "payload": {"x": b"1"}}, "JSON can't hold"),
    "verifier blank": ("prompt", {"prompt": "q", "verifier": "", "answer": "1"}, "verifier is blank"),
    "prompt answered": (
        "prompt",
        {"prompt": [U, A], "verifier": "exact", "answer": "1"},
        "must end where the assistant is to speak",
    ),
    "prompt an object": ("prompt", {"prompt": U, "verifier": "exact", "answer": "1"}, "prompt is of type dict"),
    "no events": ("events", {"member": "m", "events": []}, "events is an empty list"),
    "event a text": ("events", {"member": "m", "events": ["x"]}, "event 1 is of type str"),
    "event with more": ("events", {"member": "m", "events": [{"item": "i", "x": 1}]}, "event 1 has unknown field 'x'"),
    "event without a time": (
        "events",
        {"member": "m", "events": [{"item": "i", "action": "a"}]},
        "timestamp is missing or null",
    ),
    "time as text": (
        "events",
        {"member": "m", "events": [{"item": "i", "action": "a", "timestamp": "5"}]},
        "timestamp is of type str",
    ),
    "time in milliseconds": (
        "events",
        {"member": "m", "events": [{"item": "i", "action": "a", "timestamp": 1_700_000_000_000}]},
        "not milliseconds",
    ),
    "item a number": ("events", {"member": "m", "events": [{"item": 5, "action": "a", "timestamp": 5}]}, "item is of type int"),
    "value infinite": (
        "events",
        {"member": "m", "events": [{"item": "i", "action": "a", "timestamp": 5, "value": float("inf")}]},
        "value is inf",
    ),
    "times not in order": (
        "events",
        {"member": "m", "events": [{"item": "i", "action": "a", "timestamp": time} for time in (6, 5)]},
        "event 2 is before event 1",
    ),
    "member a number": (
        "events",
        {"member": 5, "events": [{"item": "i", "action": "a", "timestamp": 5}]},
        "member is of type int",
    ),
    "lists of different lengths": (
        "event_columns",
        {"member": "m", "items": ["a"], "actions": ["x", "y"], "timestamps": [1]},
        r"different lengths \(items: 1, actions: 2, timestamps: 1\)",
    ),
}


@pytest.mark.parametrize(("layout", "row", "reason"), BAD.values(), ids=BAD.keys())
def test_a_row_that_breaks_a_rule_is_refused_with_field_and_reason(layout: str, row: dict[str, Any], reason: str) -> None:
    """[A16]"""
    known = next(known for known in LAYOUTS if known.name == layout)
    with pytest.raises(RowRefused, match=reason):
        known.check(row, P)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(LAYOUTS),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
        max_leaves=8,
    ).flatmap(lambda value: st.tuples(st.just(value), st.dictionaries(st.sampled_from(KEYS), st.just(value), max_size=6))),
)
def test_any_value_is_an_example_or_refused(layout: Layout, values: tuple[object, dict[str, object]]) -> None:
    """[A16] No value whatever makes another exception: by itself, as some columns, and instead of each column of a row."""
    anything, columns = values
    good = next(row for name, row, _ in GOOD.values() if name == layout.name)
    for row in [anything, columns, *({**good, name: anything} for name in layout.known)]:
        try:
            assert layout.check(row, P).source == P
        except RowRefused as refused:
            assert str(refused)


DOCS = Path(__file__).resolve().parents[4] / "docs" / "data-formats.md"


def test_each_row_in_the_documentation_is_of_the_layout_it_stands_under() -> None:
    """A heading names a layout, the blocks of JSON below it are its rows; every layout has one."""
    shown: set[str] = set()
    for section in re.split(r"^### ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        name = section.split("\n", 1)[0]
        for block in re.findall(r"```json\n(.*?)\n```", section, flags=re.DOTALL):
            row = json.loads(block)
            found = find_layout(Rows(row), ANY)
            assert found.name == name
            assert found.check(row, P).source == P
            shown.add(name)
    assert shown == {layout.name for layout in LAYOUTS}

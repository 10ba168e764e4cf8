"""How checked examples lie in Arrow files: a schema for each kind, and the way there and back."""

from typing import Any

import pyarrow as pa

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

Record = dict[str, Any]


def _text(name: str, *, optional: bool = False) -> pa.Field:
    return pa.field(name, pa.string(), nullable=optional)


def _list(name: str, item: pa.DataType) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("item", item, nullable=False)), nullable=False)


_CALL = pa.struct([_text("name"), _text("arguments"), _text("call_id", optional=True)])
MESSAGE = pa.struct(
    [
        _text("role"),
        _text("content"),
        _text("thinking", optional=True),
        _list("tool_calls", _CALL),
        _text("name", optional=True),
        _text("call_id", optional=True),
        pa.field("weight", pa.float64()),
    ]
)
_EVENT = pa.struct(
    [_text("item"), _text("action"), pa.field("timestamp", pa.int64(), nullable=False), pa.field("value", pa.float64())]
)
KIND_OF: dict[type, str] = {
    Conversation: "conversation",
    Completion: "completion",
    PreferencePair: "preference",
    Prompt: "prompt",
    EventSequence: "events",
}
TYPE_OF = {kind: row_type for row_type, kind in KIND_OF.items()}
_FIELDS: dict[str, list[pa.Field]] = {
    "conversation": [
        _list("messages", MESSAGE),
        _text("answer", optional=True),
        _list("tools", pa.string()),
        _text("labels", optional=True),
    ],
    "completion": [_text("prompt"), _text("completion"), _text("answer", optional=True), _text("labels", optional=True)],
    "preference": [
        *(_list(name, MESSAGE) for name in ("prompt", "chosen", "rejected")),
        pa.field("margin", pa.float64(), nullable=False),
    ],
    "prompt": [_list("messages", MESSAGE), _text("verifier"), _text("payload"), _list("tools", pa.string())],
    "events": [_text("member"), _list("events", _EVENT)],
}
SCHEMAS = {kind: pa.schema([_text("id"), _text("source"), *fields]) for kind, fields in _FIELDS.items()}
"""Kind of example -> columns of its shards."""


def to_record(example: Example) -> Record:
    """The columns of an example."""
    record: Record = {"id": example.sample_id, "source": example.source}
    match example:
        case Conversation():
            record |= {"messages": _messages(example.messages), "answer": example.answer, "tools": list(example.tools)}
            record["labels"] = example.labels
        case Completion():
            record |= {"prompt": example.prompt, "completion": example.completion, "answer": example.answer}
            record["labels"] = example.labels
        case PreferencePair():
            record |= {name: _messages(getattr(example, name)) for name in ("prompt", "chosen", "rejected")}
            record["margin"] = example.margin
        case Prompt():
            record |= {"messages": _messages(example.messages), "tools": list(example.tools)}
            record |= {"verifier": example.verifier, "payload": example.payload}
        case EventSequence():
            record |= {"member": example.member, "events": [vars(event) for event in example.events]}
    return record


def from_record(kind: str, record: Record) -> Example:
    """The example of a kind in its columns."""
    sample_id, source = record["id"], record["source"]
    match kind:
        case "conversation":
            messages = _from_messages(record["messages"])
            return Conversation(sample_id, messages, source, record["answer"], tuple(record["tools"]), record["labels"])
        case "completion":
            return Completion(sample_id, record["prompt"], record["completion"], source, record["answer"], record["labels"])
        case "preference":
            prompt, chosen, rejected = (_from_messages(record[name]) for name in ("prompt", "chosen", "rejected"))
            return PreferencePair(sample_id, prompt, chosen, rejected, source, record["margin"])
        case "prompt":
            messages = _from_messages(record["messages"])
            return Prompt(sample_id, messages, source, record["verifier"], record["payload"], tuple(record["tools"]))
        case "events":
            return EventSequence(sample_id, record["member"], tuple(Event(**event) for event in record["events"]), source)
    raise AssertionError(kind)


def num_characters(record: Record) -> int:
    """Of all text in a record, for the size of batches."""
    total, pending = 0, list(record.values())
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return total


def _messages(messages: tuple[Message, ...]) -> list[Record]:
    return [{**vars(message), "tool_calls": [vars(call) for call in message.tool_calls]} for message in messages]


def _from_messages(records: list[Record]) -> tuple[Message, ...]:
    return tuple(
        Message(**{**record, "tool_calls": tuple(ToolCall(**call) for call in record["tool_calls"])}) for record in records
    )

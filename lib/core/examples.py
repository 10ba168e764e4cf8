"""Typed training examples: what a data row becomes once it has been checked."""

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)

IGNORE_INDEX = -100
"""Label of a position that has no loss; torch's own convention."""


@dataclass(frozen=True)
class ToolCall:
    """A function the assistant asks to be called."""

    name: str
    arguments: str
    """A JSON object as text, in the row's own key order."""
    call_id: str | None = None
    """Ties a tool's result to its call; None where the layout has no ids."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    thinking: str | None = None
    """What an assistant wrote before its answer; None where there is no thinking block."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls an assistant makes at the end of its turn."""
    name: str | None = None
    """Of the tool whose result a message of role "tool" is."""
    call_id: str | None = None
    """The call that a message of role "tool" answers."""
    weight: float | None = None
    """Factor on the loss of an assistant's turn, 0 for none; None: decided by the encoder's TrainOn."""


@dataclass(frozen=True)
class Conversation:
    """A checked conversation: at least one assistant turn, the roles in an order that templates accept."""

    sample_id: str
    """Unique in its data set; stays with the sample through packing, metrics and errors."""
    messages: tuple[Message, ...]
    source: str
    """`file:line` (or `file:row`) that it came from."""
    answer: str | None = None
    """What a verifier compares a generated answer to; None where there is nothing to verify."""
    tools: tuple[str, ...] = ()
    """Functions offered to the assistant: one JSON object each, as text."""
    labels: str | None = None
    """What output heads should put out, as JSON: head -> value, or list of values by token; None: nothing is told."""


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on, without a chat template; the completion and the end of text are trained."""

    sample_id: str
    prompt: str
    """May be empty: then the whole text is trained."""
    completion: str
    source: str
    answer: str | None = None
    labels: str | None = None
    """See Conversation."""


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, the first preferred."""

    sample_id: str
    prompt: tuple[Message, ...]
    """Ends before the turn that is compared."""
    chosen: tuple[Message, ...]
    """At least one assistant turn; so in `rejected`, from which it differs."""
    rejected: tuple[Message, ...]
    source: str
    margin: float = 0.0
    """How much better `chosen` is, in units of reward; 0 where it is not known."""


@dataclass(frozen=True)
class Prompt:
    """What a policy answers in online RL, and what its answer is judged with."""

    sample_id: str
    messages: tuple[Message, ...]
    """Ends with a turn that is not the assistant's."""
    source: str
    verifier: str
    """Name of a reward in the catalogue."""
    payload: str
    """JSON that the verifier reads: the expected answer, tests, an item's metadata."""
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """One interaction of a member."""

    item: str
    action: str
    timestamp: int
    """Seconds since 1970-01-01 UTC."""
    value: float | None = None
    """A rating, a watched share; None where the action says all."""


@dataclass(frozen=True)
class EventSequence:
    """A member's interactions in order of time."""

    sample_id: str
    member: str
    events: tuple[Event, ...]
    source: str


Example = Conversation | Completion | PreferencePair | Prompt | EventSequence


@dataclass(frozen=True)
class Encoded:
    """A tokenised sample."""

    sample_id: str
    token_ids: list[int]
    """[T]"""
    loss_mask: list[bool]
    """[T] True on tokens whose loss counts: the assistant's, including the end of its turn."""
    weights: list[float] | None = None
    """[T] factor on the loss of a trained token, in the sum and in the count that divides it; 0 off the mask. None: all 1."""

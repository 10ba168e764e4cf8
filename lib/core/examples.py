"""Typed training examples: what a data row becomes once it has been checked."""

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)

IGNORE_INDEX = -100
"""Label of a position that has no loss; torch's own convention."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


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


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation."""

    sample_id: str
    token_ids: list[int]
    """[T]"""
    loss_mask: list[bool]
    """[T] True on tokens whose loss counts: the assistant's, including the end of its turn."""

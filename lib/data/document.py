"""Tokenised samples, alone and sharing a row."""

from dataclasses import dataclass, field

import numpy as np

from lib.core.examples import Encoded


@dataclass(eq=False, slots=True, init=False)
class Document:
    """One tokenised sample; not changed once it is made. There is one for each row, so making it must cost little: it isn't
    frozen, and what is asked of it again and again is counted once."""

    sample_id: str
    token_ids: np.ndarray
    """[T] int32"""
    loss_mask: np.ndarray
    """[T] bool, True on trained tokens."""
    weights: np.ndarray | None
    """[T] float32 factor on the loss of a trained token; 0 off the mask. None: all 1."""
    num_targets: int
    """Trained tokens that some position predicts: all but the first token, which no token comes before."""
    labels: str | None
    """What output heads should put out for it; see Conversation."""
    num_tokens: int = field(init=False)
    """T"""

    def __init__(
        self,
        sample_id: str,
        token_ids: np.ndarray,
        loss_mask: np.ndarray,
        weights: np.ndarray | None = None,
        num_targets: int | None = None,
        labels: str | None = None,
    ) -> None:
        """Args: num_targets: where it is known already."""
        self.sample_id, self.token_ids, self.loss_mask, self.weights = sample_id, token_ids, loss_mask, weights
        self.labels, self.num_tokens = labels, len(token_ids)
        self.num_targets = int(np.count_nonzero(loss_mask[1:])) if num_targets is None else num_targets

    @staticmethod
    def of(encoded: Encoded, labels: str | None = None) -> "Document":
        weights = None if encoded.weights is None else np.array(encoded.weights, np.float32)
        return Document(
            encoded.sample_id,
            np.array(encoded.token_ids, np.int32),
            np.frombuffer(bytes(encoded.loss_mask), np.bool_),
            weights,
            labels=labels,
        )

    def encoded(self) -> Encoded:
        """The same as plain lists."""
        weights = None if self.weights is None else self.weights.tolist()
        return Encoded(self.sample_id, self.token_ids.tolist(), self.loss_mask.tolist(), weights)

    def part(self, start: int, stop: int) -> "Document":
        """Tokens `start` to `stop` as a document of their own; its first token, like any first one, is not a target. It has no
        labels: those are of the whole."""
        weights = None if self.weights is None else self.weights[start:stop]
        return Document(self.sample_id, self.token_ids[start:stop], self.loss_mask[start:stop], weights)


@dataclass(frozen=True)
class PackedRow:
    """Documents that share one row of a batch, in order."""

    documents: tuple[Document, ...]

    @property
    def num_tokens(self) -> int:
        return sum([document.num_tokens for document in self.documents])

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return tuple([document.sample_id for document in self.documents])

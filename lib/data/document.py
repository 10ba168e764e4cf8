"""Tokenised samples, alone and sharing a row."""

from dataclasses import dataclass

import numpy as np

from lib.core.examples import Encoded


@dataclass(eq=False, slots=True)
class Document:
    """One tokenised sample; not changed once it is made. Not frozen: there is one for each row, and that costs 1 us more."""

    sample_id: str
    token_ids: np.ndarray
    """[T] int32"""
    loss_mask: np.ndarray
    """[T] bool, True on trained tokens."""
    weights: np.ndarray | None = None
    """[T] float32 factor on the loss of a trained token; 0 off the mask. None: all 1."""
    num_targets: int = -1
    """Trained tokens that some position predicts: all but the first token, which no token comes before. Counted where it
    isn't given."""
    labels: str | None = None
    """What output heads should put out for it; see Conversation."""

    def __post_init__(self) -> None:
        if self.num_targets < 0:
            self.num_targets = int(np.count_nonzero(self.loss_mask[1:]))

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
        return sum(len(document.token_ids) for document in self.documents)

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return tuple(document.sample_id for document in self.documents)

"""One virtual stream: its share of the rows, epoch after epoch, as packed rows."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.config.data import DataConfig
from lib.core.errors import DataError
from lib.core.examples import Conversation
from lib.data.batch import Document, PackedRow
from lib.data.packing import BestFitPacker, Pack, longest_first
from lib.data.rows import ConversationTable
from lib.tokens.chat import ChatEncoder

COUNTS = ("visited", "dropped", "truncated", "rows", "documents", "tokens", "padding")
NUM_LENGTH_BINS = 32


@dataclass
class Item:
    """A document on its way: a reference to a row, and its tokens where they are at hand."""

    row: int
    document: Document | None


@dataclass
class VirtualStream:
    """Reads rows in windows of `config.open_packs`, packs them, and gives out packed rows; endless.

    The state is references to rows: a document that was in an open pack is tokenised again after a restart.
    """

    table: ConversationTable
    encoder: ChatEncoder
    config: DataConfig
    sequence_length: int
    order_of: Callable[[int], np.ndarray]
    """Epoch -> the rows of this stream, in the order they are visited."""
    epoch: int = 0
    cursor: int = 0
    """Rows of the epoch that were visited."""
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    """`visited`, `dropped` and `truncated` count rows read; the others what was given out."""
    length_bins: list[int] = field(default_factory=lambda: [0] * NUM_LENGTH_BINS)
    """Documents given out by length: bin b holds those of 2**(b-1) + 1 to 2**b tokens (bin 0: of one token)."""

    def __post_init__(self) -> None:
        self._packer: BestFitPacker[Item] = BestFitPacker(self.sequence_length, self.config.open_packs)
        self._pending: deque[Pack[Item]] = deque()

    def next_row(self) -> PackedRow:
        """The next packed row.

        Raises:
            DataError: a row is too long under the policy "refuse", can't be tokenised, or no row at all can be used.
        """
        num_unused = 0
        while not self._pending:
            items = [item for item in self._read_window() if item.document is not None]
            num_unused = 0 if items else num_unused + self.config.open_packs
            if num_unused > len(self.table):
                raise DataError(
                    f"no row can be used: each is longer than the sequence of {self.sequence_length} tokens, "
                    "or has nothing to train on within it; raise sequence_length"
                )
            lengths = np.array([len(item.document.token_ids) for item in items if item.document is not None], dtype=np.int64)
            order = longest_first(lengths, max(1, len(items)))
            self._pending.extend(self._packer.extend(lengths[order].tolist(), [items[index] for index in order]))
        pack = self._pending.popleft()
        row = PackedRow(tuple(self._documents(pack.refs)))
        self._count(row)
        return row

    def state(self) -> dict[str, Any]:
        """All that decides what comes next, as JSON values."""
        packer = self._packer.state()
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "open": [[room, [item.row for item in items]] for room, items in packer["packs"]],
            "pending": [[pack.num_free, [item.row for item in pack.refs]] for pack in self._pending],
            "counts": dict(self.counts),
            "length_bins": list(self.length_bins),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken."""
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        packs = [[room, [Item(row, None) for row in rows]] for room, rows in state["open"]]
        self._packer.load_state({"capacity": self.sequence_length, "open_packs": self.config.open_packs, "packs": packs})
        self._pending = deque(Pack([Item(row, None) for row in rows], room) for room, rows in state["pending"])
        self.counts = dict(state["counts"])
        self.length_bins = list(state["length_bins"])

    def _read_window(self) -> list[Item]:
        """The next rows in order; those that the policy drops come without a document."""
        rows: list[int] = []
        while len(rows) < self.config.open_packs:
            order = self.order_of(self.epoch)
            taken = order[self.cursor : self.cursor + self.config.open_packs - len(rows)]
            rows += taken.tolist()
            self.cursor += len(taken)
            if self.cursor == len(order):
                self.epoch, self.cursor = self.epoch + 1, 0
        self.counts["visited"] += len(rows)
        conversations = self.table.rows(rows)
        documents = map(Document.of, self.encoder.encode(conversations))
        return [Item(row, self._admit(*pair)) for row, pair in zip(rows, zip(conversations, documents))]

    def _admit(self, conversation: Conversation, document: Document) -> Document | None:
        """The document as it is trained, or None where it is dropped."""
        if len(document.token_ids) > self.sequence_length:
            if self.config.long_rows == "refuse":
                raise DataError(
                    f"{conversation.source}: row {conversation.sample_id!r} has {len(document.token_ids)} tokens, the sequence "
                    f"{self.sequence_length}; raise sequence_length, or set config.data.long_rows to 'drop' or 'truncate'"
                )
            cut = self._cut(document)
            if self.config.long_rows == "drop" or not cut.num_targets:
                self.counts["dropped"] += 1
                return None
            self.counts["truncated"] += 1
            return cut
        if not document.num_targets:
            raise DataError(f"{conversation.source}: row {conversation.sample_id!r} has nothing to predict; give it an answer")
        return document

    def _cut(self, document: Document) -> Document:
        """The document's start, as much as a row holds: what is lost is the end, never the system message."""
        length = self.sequence_length
        return Document(document.sample_id, document.token_ids[:length], document.loss_mask[:length])

    def _documents(self, items: Sequence[Item]) -> list[Document]:
        missing = [item for item in items if item.document is None]
        for item, encoded in zip(missing, self.encoder.encode(self.table.rows([item.row for item in missing]))):
            item.document = self._cut(Document.of(encoded))
        return [item.document for item in items if item.document is not None]

    def _count(self, row: PackedRow) -> None:
        self.counts["rows"] += 1
        self.counts["documents"] += len(row.documents)
        self.counts["tokens"] += row.num_tokens
        self.counts["padding"] += self.sequence_length - row.num_tokens
        for document in row.documents:
            self.length_bins[min((len(document.token_ids) - 1).bit_length(), NUM_LENGTH_BINS - 1)] += 1

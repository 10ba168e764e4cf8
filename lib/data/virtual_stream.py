"""One virtual stream: its share of the rows, epoch after epoch, as packed rows."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

from lib.config.data import DataConfig
from lib.core.errors import DataError
from lib.data.document import Document, PackedRow
from lib.data.mixture import Mixer, Mixture
from lib.data.packing import BestFitPacker, OpenPack, Pack, Snapshot

COUNTS = (
    *("visited", "dropped", "truncated", "split", "dropped_tokens", "cut_tokens"),
    *("rows", "documents", "tokens", "targets", "padding"),
)
NUM_LENGTH_BINS = 32
_LENGTH: Callable[[Any], int] = itemgetter(0)
"""Of an Item."""
_UNUSED_EPOCHS = 2
"""Epochs in which no row could be used, after which a stream gives up."""

Encode = Callable[[Sequence[Any]], Sequence[Document]]
"""Examples to documents, one for each, in order; the same ones whatever else is in the call."""


Place = tuple[int, int, int, int]
"""A reference to a document, all that the state keeps of it: source, split, row, and the piece of a row that was split, 0
for a whole row. A plain tuple of numbers, which the garbage collector doesn't look at."""


Item = tuple[int, Place, Document | None]
"""A document on its way: its number of tokens, where it is from, and itself; 0 and None before it is read again after a
restart. A plain tuple, since one is made for every row."""


class Position(NamedTuple):
    """Where a stream was; not changed by what it does next. Taken after every row, so taking it copies little."""

    mixer: dict[str, Any]
    num_placed: int
    held: Snapshot[Item]
    pending: tuple[Pack[Item], ...]
    used_epoch: int
    counts: dict[str, int]
    length_bins: list[int]
    shares: list[list[int]]

    def to_json(self) -> dict[str, Any]:
        """All that decides what comes next, as JSON values: documents become references to rows."""
        return {
            "mixer": self.mixer,
            "num_placed": self.num_placed,
            "open": [[pack.age, pack.room, _places(pack.refs)] for pack in self.held.packs()],
            "pending": [[pack.num_free, _places(pack.refs)] for pack in self.pending],
            "used_epoch": self.used_epoch,
            "counts": self.counts,
            "length_bins": self.length_bins,
            "shares": self.shares,
        }


@dataclass
class VirtualStream:
    """Reads rows in windows of `config.open_packs`, packs them, and gives out packed rows; endless.

    The state is references to rows: a document that was in an open pack is read and tokenised again after a restart.
    """

    mixture: Mixture
    encode: Encode
    config: DataConfig
    sequence_length: int
    number: int
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    """Those up to `cut_tokens` are of rows read; the others of what was given out."""
    length_bins: list[int] = field(default_factory=lambda: [0] * NUM_LENGTH_BINS)
    """Documents given out by length: bin b holds those of 2**(b-1) + 1 to 2**b tokens (bin 0: of one token)."""

    def __post_init__(self) -> None:
        config, num_sources = self.config, len(self.mixture.orders)
        self._mixer = Mixer(self.mixture, self.number)
        self._packer: BestFitPacker[Item] = BestFitPacker(self.sequence_length, config.open_packs, config.max_delay)
        self._pending: deque[Pack[Item]] = deque()
        self._shares = [[0, 0, 0] for _ in range(num_sources)]
        """Of each source: documents, tokens and targets given out."""
        self._used_epoch = 0
        """Epoch in which a row was last used."""
        self._is_restored = False

    def next_row(self, step: int) -> PackedRow:
        """The next packed row.

        Args:
            step: the optimizer step it is for, which decides the weights of a mixture.
        Raises:
            DataError: a row is too long under the policy "refuse", can't be tokenised, or no row at all can be used.
        """
        if self._is_restored:
            self._restore_documents()
        while not self._pending:
            items = self._read_window(step)
            if items:
                self._used_epoch = self._mixer.min_epoch
            elif self._mixer.min_epoch > self._used_epoch + _UNUSED_EPOCHS:
                raise DataError(
                    f"no row can be used: each is longer than the sequence of {self.sequence_length} tokens, "
                    "or has nothing to train on within it; raise sequence_length"
                )
            self._pack(items)
        pack = self._pending.popleft()
        self._count(pack.refs)
        return PackedRow(tuple([document for _, _, document in pack.refs if document is not None]))

    def position(self) -> Position:
        """Where the stream is after the last `next_row`."""
        return Position(
            mixer=self._mixer.state(),
            num_placed=self._packer.num_placed,
            held=self._packer.snapshot(),
            pending=tuple(self._pending),
            used_epoch=self._used_epoch,
            counts=dict(self.counts),
            length_bins=list(self.length_bins),
            shares=[list(share) for share in self._shares],
        )

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where a position was taken, given as JSON values."""
        self._mixer.load_state(state["mixer"])
        self._packer.load([OpenPack(age, room, _items(places)) for age, room, places in state["open"]], state["num_placed"])
        self._pending = deque(Pack(_items(places), num_free) for num_free, places in state["pending"])
        self._used_epoch = state["used_epoch"]
        self.counts = dict(state["counts"])
        self.length_bins = list(state["length_bins"])
        self._shares = [list(share) for share in state["shares"]]
        self._is_restored = True

    def _read_window(self, step: int) -> list[Item]:
        """Documents of the next rows in order; none of those that the policy drops."""
        rows = self._mixer.take(self.config.open_packs, step)
        self.counts["visited"] += len(rows)
        size = self.sequence_length
        items: list[Item] = []
        documents = self.encode([example for _, _, _, example in rows])
        for (source, split, row, example), document in zip(rows, documents, strict=True):
            length = document.num_tokens
            if document.num_targets and length <= size:
                items.append((length, (source, split, row, 0), document))
                continue
            for part, piece in enumerate(self._admit(document, getattr(example, "source", ""))):
                items.append((piece.num_tokens, (source, split, row, part), piece))
        return items

    def _pack(self, items: list[Item]) -> None:
        if self.config.packing == "pad":
            self._pending.extend(Pack([item], self.sequence_length - item[0]) for item in items)
            return
        # The longest first, of equal ones the first: as `longest_first` has it, without arrays for so few.
        items.sort(key=_LENGTH, reverse=True)
        self._pending.extend(self._packer.extend(map(_LENGTH, items), items))

    def _admit(self, document: Document, where: str) -> list[Document]:
        """What is trained of a document that is too long: its pieces, or nothing where it is dropped."""
        if not document.num_targets:
            raise DataError(f"{where}: row {document.sample_id!r} has nothing to predict; give it an answer")
        length = document.num_tokens
        policy = self.config.long_rows
        if policy == "refuse":
            raise DataError(
                f"{where}: row {document.sample_id!r} has {length} tokens, the sequence {self.sequence_length}; "
                "raise sequence_length, or set config.data.long_rows to 'drop', 'truncate' or 'split'"
            )
        pieces = [] if policy == "drop" else [piece for piece in self._pieces(document) if piece.num_targets]
        if not pieces:
            self.counts["dropped"] += 1
            self.counts["dropped_tokens"] += length
        elif policy == "truncate":
            self.counts["truncated"] += 1
            self.counts["cut_tokens"] += length - self.sequence_length
        else:
            self.counts["split"] += 1
        return pieces

    def _pieces(self, document: Document) -> list[Document]:
        """A long document as the policy cuts it.

        "truncate" keeps its start: what is lost is the end, never the system message. "split" repeats the last token of a
        piece at the start of the next, where it is context and no target: so each token but the first is predicted once.
        """
        size = self.sequence_length
        if self.config.long_rows == "truncate":
            return [document.part(0, size)]
        return [document.part(start, start + size) for start in range(0, document.num_tokens - 1, size - 1)]

    def _restore_documents(self) -> None:
        """Read and tokenise again what the state refers to."""
        packs = self._packer.open()
        refs = [*(pack.refs for pack in packs), *(pack.refs for pack in self._pending)]
        places = sorted({place[:3] for items in refs for _, place, _ in items})
        documents = dict(zip(places, self.encode(self._mixer.read_again(places)), strict=True))

        def read(place: Place) -> Item:
            document = documents[place[:3]]
            if document.num_tokens > self.sequence_length:
                document = [piece for piece in self._pieces(document) if piece.num_targets][place[3]]
            return document.num_tokens, place, document

        for items in refs:
            items[:] = [read(place) for _, place, _ in items]
        self._packer.load(packs, self._packer.num_placed)
        self._is_restored = False

    def _count(self, items: Sequence[Item]) -> None:
        shares, bins, num_tokens, num_targets = self._shares, self.length_bins, 0, 0
        for length, place, document in items:
            assert document is not None
            targets = document.num_targets
            share = shares[place[0]]
            share[0] += 1
            share[1] += length
            share[2] += targets
            num_tokens += length
            num_targets += targets
            bins[(length - 1).bit_length()] += 1
        counts = self.counts
        counts["rows"] += 1
        counts["documents"] += len(items)
        counts["tokens"] += num_tokens
        counts["targets"] += num_targets
        counts["padding"] += self.sequence_length - num_tokens


def _places(items: Sequence[Item]) -> list[list[int]]:
    return [list(place) for _, place, _ in items]


def _items(places: Sequence[Sequence[int]]) -> list[Item]:
    return [(0, (source, split, row, piece), None) for source, split, row, piece in places]

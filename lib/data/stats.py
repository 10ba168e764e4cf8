"""What packing made of the data, for the deck and the report."""

from dataclasses import asdict, dataclass
from typing import Any

from lib.data.mixture import OWN_DATA


@dataclass(frozen=True)
class SourceShare:
    """What a run has used of one source of its mixture."""

    documents: int
    tokens: int
    targets: int
    visited: int
    """Rows read."""
    passed_on: int
    """Rows that were its turn after its cap was reached, and came from other sources."""
    epochs: tuple[int, int]
    """Fewest and most epochs that a stream has completed."""


@dataclass(frozen=True)
class PackingReport:
    """Figures over the rows that a run has consumed."""

    rows: int
    """Packed rows."""
    documents: int
    """Documents in them; one sample counts once for each time it was used."""
    tokens: int
    targets: int
    """Tokens that are predicted."""
    padding: int
    """Slots that hold no token."""
    visited: int
    """Rows of the data set read so far; more than `documents` by those dropped and those in packs not yet used."""
    dropped: int
    """Rows left out because they are longer than the sequence."""
    dropped_tokens: int
    """Tokens of them."""
    truncated: int
    """Rows cut at the end because they are longer than the sequence."""
    cut_tokens: int
    """Tokens cut off them."""
    split: int
    """Rows longer than the sequence that became several documents."""
    length_histogram: tuple[tuple[int, int], ...]
    """(greatest length of the bin, documents): bins end at powers of two; empty ones at both ends are left out."""
    sources: dict[str, SourceShare]
    """By the name of the source."""

    @property
    def efficiency(self) -> float:
        """Share of slots that hold a token; 0 where nothing was consumed."""
        return self.tokens / max(1, self.tokens + self.padding)

    @property
    def documents_per_row(self) -> float:
        return self.documents / max(1, self.rows)

    @property
    def lost_to_length(self) -> float:
        """Share of the tokens read that were dropped or cut off; those in packs not yet used are not counted as read."""
        lost = self.dropped_tokens + self.cut_tokens
        return lost / max(1, self.tokens + lost)

    def waste(self, *, train_seconds: float, stall_seconds: float, straggler_seconds: float) -> "Waste":
        """The decomposition of a run; the seconds are those of a rank, or means over the ranks."""
        total = max(train_seconds, 1e-9)
        padding = self.padding / max(1, self.tokens + self.padding)
        return Waste(padding, self.lost_to_length, stall_seconds / total, straggler_seconds / total)

    def to_json(self) -> dict[str, Any]:
        """All fields, the ratios, and each source's share of the documents, tokens and targets, as JSON values."""
        histogram = [list(entry) for entry in self.length_histogram]
        ratios = {name: getattr(self, name) for name in ("efficiency", "documents_per_row", "lost_to_length")}
        sources = {name: self._shares(share) for name, share in self.sources.items()}
        return asdict(self) | {"length_histogram": histogram, "sources": sources} | ratios

    def _shares(self, source: SourceShare) -> dict[str, Any]:
        names = ("documents", "tokens", "targets")
        shares = {f"share_of_{name}": getattr(source, name) / max(1, getattr(self, name)) for name in names}
        return asdict(source) | {"epochs": list(source.epochs)} | shares


@dataclass(frozen=True)
class Waste:
    """Where a run's time and slots went that trained nothing; each a share from 0 to 1."""

    padding: float
    """Slots without a token."""
    lost_to_length: float
    """Tokens dropped or cut off because their row was too long."""
    stall: float
    """Time that ranks waited for their own data."""
    straggler_wait: float
    """Time that ranks, their data at hand, waited for other ranks."""


def packing_report(state: dict[str, Any]) -> PackingReport:
    """The report of a stream's state (`PackedStream.state`, or the merged state of all ranks)."""
    streams = list(state["streams"].values())
    totals = {name: sum(stream["counts"][name] for stream in streams) for name in streams[0]["counts"]}
    bins = [sum(column) for column in zip(*(stream["length_bins"] for stream in streams))]
    filled = [index for index, count in enumerate(bins) if count]
    shown = range(filled[0], filled[-1] + 1) if filled else range(0)
    histogram = tuple((2**index, bins[index]) for index in shown)
    names = [source["name"] for source in state["fingerprint"]["mixture"]] or [OWN_DATA]
    sources = {name: _source_share(streams, number) for number, name in enumerate(names)}
    return PackingReport(**totals, length_histogram=histogram, sources=sources)


def _source_share(streams: list[dict[str, Any]], number: int) -> SourceShare:
    documents, tokens, targets = (sum(stream["shares"][number][column] for stream in streams) for column in range(3))
    mixers = [stream["mixer"] for stream in streams]
    epochs = [mixer["cursors"][number][0] for mixer in mixers]
    visited = sum(mixer["num_rows"][number] for mixer in mixers)
    passed_on = sum(mixer["num_passed_on"][number] for mixer in mixers)
    return SourceShare(documents, tokens, targets, visited, passed_on, (min(epochs), max(epochs)))

"""What packing made of the data, for the deck and the report."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PackingReport:
    """Figures over the rows that a run has consumed."""

    rows: int
    """Packed rows."""
    documents: int
    """Documents in them; one sample counts once for each time it was used."""
    tokens: int
    padding: int
    """Slots that hold no token."""
    visited: int
    """Rows of the data set read so far; more than `documents` by those dropped and those in packs not yet used."""
    dropped: int
    """Rows left out because they are longer than the sequence."""
    truncated: int
    """Rows cut at the end because they are longer than the sequence."""
    length_histogram: tuple[tuple[int, int], ...]
    """(greatest length of the bin, documents): bins end at powers of two; empty ones at both ends are left out."""

    @property
    def efficiency(self) -> float:
        """Share of slots that hold a token; 0 where nothing was consumed."""
        return self.tokens / max(1, self.tokens + self.padding)

    @property
    def documents_per_row(self) -> float:
        return self.documents / max(1, self.rows)

    def to_json(self) -> dict[str, Any]:
        """All fields and the two ratios, as JSON values."""
        histogram = [list(entry) for entry in self.length_histogram]
        ratios = {"efficiency": self.efficiency, "documents_per_row": self.documents_per_row}
        return asdict(self) | {"length_histogram": histogram} | ratios


def packing_report(state: dict[str, Any]) -> PackingReport:
    """The report of a stream's state (`PackedStream.state`, `Prefetcher.state`, or the merged state of all ranks)."""
    streams = list(state["streams"].values())
    totals = {name: sum(stream["counts"][name] for stream in streams) for name in streams[0]["counts"]}
    bins = [sum(column) for column in zip(*(stream["length_bins"] for stream in streams))]
    filled = [index for index, count in enumerate(bins) if count]
    shown = range(filled[0], filled[-1] + 1) if filled else range(0)
    return PackingReport(**totals, length_histogram=tuple((2**index, bins[index]) for index in shown))

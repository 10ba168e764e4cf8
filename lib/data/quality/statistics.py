"""How long rows are, and in which scripts they are written."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.core.examples import Example
from lib.data.quality.text import parts, words

_BINS = 40
_SCRIPTS: tuple[tuple[int, str], ...] = (
    *((0x0, ""), (0x41, "Latin"), (0x5B, ""), (0x61, "Latin"), (0x7B, ""), (0xAA, "Latin"), (0xAB, ""), (0xB5, "")),
    *((0xBA, "Latin"), (0xBB, ""), (0xC0, "Latin"), (0xD7, ""), (0xD8, "Latin"), (0xF7, ""), (0xF8, "Latin"), (0x250, "Latin")),
    *((0x2B0, ""), (0x370, "Greek"), (0x400, "Cyrillic"), (0x530, "Armenian"), (0x590, "Hebrew"), (0x600, "Arabic")),
    *((0x700, "other"), (0x750, "Arabic"), (0x780, "other"), (0x8A0, "Arabic"), (0x900, "Devanagari"), (0x980, "Bengali")),
    *((0xA00, "other"), (0xB80, "Tamil"), (0xC00, "Telugu"), (0xC80, "other"), (0xE00, "Thai"), (0xE80, "other")),
    *((0x10A0, "Georgian"), (0x1100, "Hangul"), (0x1200, "other"), (0x1E00, "Latin"), (0x1F00, "Greek"), (0x2000, "")),
    *((0x2C00, "other"), (0x2E00, ""), (0x2E80, "Han"), (0x2FF0, ""), (0x3040, "Kana"), (0x3100, "other"), (0x3130, "Hangul")),
    *((0x3190, ""), (0x31F0, "Kana"), (0x3200, ""), (0x3400, "Han"), (0x4DC0, ""), (0x4E00, "Han"), (0xA000, "other")),
    *(
        (0xAC00, "Hangul"),
        (0xD800, ""),
        (0xF900, "Han"),
        (0xFB00, "other"),
        (0xFB50, "Arabic"),
        (0xFE00, ""),
        (0xFE70, "Arabic"),
    ),
    *((0xFF00, ""), (0xFF21, "Latin"), (0xFF3B, ""), (0xFF41, "Latin"), (0xFF5B, ""), (0xFF66, "Kana"), (0xFFA0, "Hangul")),
    *((0xFFE0, ""), (0x10000, "other"), (0x1D000, ""), (0x20000, "Han"), (0x40000, "")),
)
"""First code point of a run of Unicode blocks, and the script that its letters belong to; empty where it holds no letters."""
_STARTS = np.array([start for start, _ in _SCRIPTS])
_NAMES = sorted({name for _, name in _SCRIPTS})
_NAME_OF = np.array([_NAMES.index(name) for _, name in _SCRIPTS])


@dataclass
class Lengths:
    """Of one measure over all rows."""

    total: int = 0
    least: int | None = None
    most: int = 0
    bins: list[int] = field(default_factory=lambda: [0] * _BINS)
    """Bin b counts rows of 2**(b-1) + 1 to 2**b; bin 0 those of 0 and 1."""

    def add(self, length: int) -> None:
        self.total += length
        self.least = length if self.least is None else min(self.least, length)
        self.most = max(self.most, length)
        self.bins[min(max(0, length - 1).bit_length(), _BINS - 1)] += 1

    def to_json(self) -> dict[str, Any]:
        num_rows = sum(self.bins)
        histogram = [[2**number, count] for number, count in enumerate(self.bins) if count]
        mean = self.total / num_rows if num_rows else 0.0
        return {"total": self.total, "mean": mean, "least": self.least or 0, "most": self.most, "histogram": histogram}


@dataclass
class TextStatistics:
    """Lengths of rows in characters and words, and each script's share of the letters.

    A script is found by Unicode block. It tells Cyrillic from Han, not Spanish from English.
    """

    characters: Lengths = field(default_factory=Lengths)
    words: Lengths = field(default_factory=Lengths)
    letters: np.ndarray = field(default_factory=lambda: np.zeros(len(_NAMES), np.int64))

    def add(self, example: Example) -> None:
        """Count a row, all its texts together."""
        texts = [text for _, text in parts(example)]
        self.characters.add(sum(map(len, texts)))
        self.words.add(sum(len(words(text)) for text in texts))
        for text in texts:
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            runs = np.searchsorted(_STARTS, codes, side="right") - 1
            self.letters += np.bincount(_NAME_OF[runs], minlength=len(_NAMES))

    def to_json(self) -> dict[str, Any]:
        counts = {name: int(count) for name, count in zip(_NAMES, self.letters) if name and count}
        total = sum(counts.values())
        shares = {name: count / total for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}
        return {"characters": self.characters.to_json(), "words": self.words.to_json(), "script_shares": shares}

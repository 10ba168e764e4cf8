"""Ids of many texts put together from those of their words: nearly every word of a text was in an earlier one.

A tokenizer spends its time on cutting text into words and on where each character was; looking a word up comes after that.
Where its pipeline is known to cut before the space of a word (see lib/tokens/cuts.py), a word has the same ids in every text.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import tokenizers

_PIECES_KEPT = 1 << 16
"""About 16 MiB. All are forgotten when there are more: those that are common come again soon."""
_MAX_KEPT_CHARACTERS = 48
_CUT = "\0"

Ids = tuple[int, ...]


class WordEncoder:
    """Encodes texts by a pipeline that may be cut; a call changes nothing but what is remembered. Serves several threads.

    A piece is what lies between two cuts, with the space that it begins with. A word that ends a text is a piece as well, so
    what a piece may end with is asked only where another one follows.
    """

    def __init__(self, backend: tokenizers.Tokenizer, open_ends: frozenset[str], *, pieces_kept: int = _PIECES_KEPT) -> None:
        """Args: open_ends: characters behind which a text must not be cut before a space."""
        self._backend, self._open_ends, self._pieces_kept = backend, open_ends | {""}, pieces_kept
        self._kept: dict[str, Ids] = {"": ()}
        """None has an open end but the empty one: so a text may be cut before each space if all that comes of it is in here."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, the same as of the text as a whole."""
        found = [self._known(text) for text in texts]
        cut = {number: self._pieces(texts[number]) for number, ids in enumerate(found) if ids is None}
        if cut:
            learned = self._learned(chain.from_iterable(cut.values()))
            for number, pieces in cut.items():
                found[number] = list(chain.from_iterable(map(learned.__getitem__, pieces)))
        return [ids for ids in found if ids is not None]

    def _known(self, text: str) -> list[int] | None:
        if _CUT in text:
            return None
        try:
            return list(chain.from_iterable(map(self._kept.__getitem__, _words(text))))
        except KeyError:
            return None

    def _pieces(self, text: str) -> list[str]:
        if _CUT in text:
            return [text]
        words = _words(text)
        pieces = []
        begin = 0
        for number, word in enumerate(words[:-1], start=1):
            if word[-1:] not in self._open_ends:
                pieces.append("".join(words[begin:number]))
                begin = number
        return [*pieces, "".join(words[begin:])]

    def _learned(self, pieces: Iterable[str]) -> dict[str, Ids]:
        """Ids of some pieces, now kept as well if they are short."""
        ids = {piece: self._kept.get(piece) for piece in pieces}  # of its own: another thread may forget
        new = [piece for piece, known in ids.items() if known is None]
        later = [piece for piece in new if piece[0] == " " and piece[-1] not in self._open_ends]
        alone = [piece for piece in new if piece[0] != " " or piece[-1] in self._open_ends]
        encoded = self._backend.encode_batch_fast(alone, add_special_tokens=False)
        learned = dict(zip(alone, (tuple(encoding.ids) for encoding in encoded))) | self._encode_joined(later)
        short = [piece for piece in new if len(piece) <= _MAX_KEPT_CHARACTERS and piece[-1] not in self._open_ends]
        if len(self._kept) + len(short) > self._pieces_kept:
            self._kept = {"": ()}
        self._kept.update((piece, learned[piece]) for piece in short[: self._pieces_kept])
        return {piece: learned[piece] if known is None else known for piece, known in ids.items()}

    def _encode_joined(self, pieces: Sequence[str]) -> dict[str, Ids]:
        """Ids of pieces that may follow one another: of one text, since a text costs as much as three words."""
        if not pieces:
            return {}
        (encoding,) = self._backend.encode_batch(["".join(pieces)], add_special_tokens=False)
        found: list[list[int]] = []
        stop = 0
        rest = iter(pieces)
        for token_id, (start, _) in zip(encoding.ids, encoding.offsets):
            while start >= stop:
                stop += len(next(rest))
                found.append([])
            found[-1].append(token_id)
        return dict(zip(pieces, map(tuple, found), strict=True))


def _words(text: str) -> list[str]:
    """A text cut before every space."""
    return text.replace(" ", f"{_CUT} ").split(_CUT)

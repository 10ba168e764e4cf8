"""Which added tokens are control tokens, and how text that spells one is found."""

import re
from collections.abc import Iterator, Mapping

from tokenizers import AddedToken

_HTML_TAGS = frozenset(
    "a b bbox blockquote body br caption code div em footer h1 h2 h3 h4 h5 h6 hr html i iframe img li ol p pre s span "  # noqa: SIM905 - a table
    "strong sub sup table tbody td tfoot th thead tr u ul".split()
)
"""Gemma has tokens for these tags; a page of HTML in a message is text."""
_TAG = re.compile(r"</?([a-z][a-z0-9]*)>")
_BRACKETED = re.compile(r"<[^<>]*>")


def control_tokens(added: Mapping[int, AddedToken], template: str, text_tokens: frozenset[str]) -> dict[str, int]:
    """Text -> id of the added tokens that are instructions to the model, flagged special or not.

    An added token is plain text only if it isn't flagged special, isn't written out in `template`, and is white space
    (runs of newlines, tabs or word separators), an HTML tag, or one of `text_tokens` (ids planned for what rows contain).
    """
    found = {}
    for token_id, token in added.items():
        text = token.content
        tag = _TAG.fullmatch(text)
        is_text = not text.strip("\u2581 \t\r\n") or (tag is not None and tag[1] in _HTML_TAGS) or text in text_tokens
        in_template = bool(text.strip("\u2581 \t\r\n")) and text in template
        if token.special or (in_template and text not in text_tokens) or not is_text:
            found[text] = token_id
    return found


class ControlText:
    """Finds control tokens in text, in time that hardly depends on how many there are (Gemma has thousands)."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        others = sorted((text for text in tokens if not _BRACKETED.fullmatch(text)), key=len, reverse=True)
        self._others = re.compile("|".join(map(re.escape, others))) if others else None
        self._first_characters = tuple(sorted({text[0] for text in tokens}))

    def may_be_in(self, text: str) -> bool:
        """False where no control token is in the text, found out fast; True says nothing."""
        return any(character in text for character in self._first_characters)

    def first(self, text: str) -> str | None:
        """The first control token in the text."""
        return next((text[start:stop] for start, stop in self.spans(text)), None) if self.may_be_in(text) else None

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Places of control tokens in order, from left to right, the longest where two begin alike."""
        found = [match.span() for match in _BRACKETED.finditer(text) if match[0] in self._tokens]
        if self._others is not None:
            found += [match.span() for match in self._others.finditer(text)]
        stop = 0
        for span in sorted(found, key=lambda span: (span[0], -span[1])):
            if span[0] >= stop:
                stop = span[1]
                yield span

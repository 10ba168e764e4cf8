"""Which pipelines may be cut before a space, and behind which characters not."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece

from lib.tokens.cuts import WHITE_SPACE, open_ends

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def _pipeline(pattern: str = _WORDS, model: Any = None, add_prefix_space: bool = False) -> Tokenizer:
    found = Tokenizer(model or BPE())
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ]
    )
    return found


def _with_token(token: AddedToken) -> Tokenizer:
    found = _pipeline()
    found.add_tokens([token])
    return found


def _marked(*tokens: str, **settings: Any) -> Tokenizer:
    """Spaces become marks, and pairs are merged in the whole text."""
    vocabulary = _BYTES | {token: 256 + number for number, token in enumerate(tokens)}
    found = Tokenizer(BPE(vocabulary, [], **{"byte_fallback": True, **settings}))
    found.normalizer = normalizers.Replace(" ", "▁")
    return found


def _normalized(normalizer: Any) -> Tokenizer:
    found = _pipeline()
    found.normalizer = normalizer
    return found


def test_white_space_is_all_white_space() -> None:
    """No other character of Unicode is white space; a regular expression's \\s takes fewer."""
    assert {character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace()} == WHITE_SPACE


@pytest.mark.parametrize("make", [_pipeline, lambda: _normalized(normalizers.NFC()), lambda: _with_token(AddedToken("<b>"))])
def test_regular_expressions_of_known_parts_cut_behind_any_other_character(make: Callable[[], Tokenizer]) -> None:
    assert open_ends(make()) == WHITE_SPACE


def test_marks_cut_where_no_token_has_one_behind_the_character() -> None:
    """The tokens a▁b and ▁▁ may come of a merge over the space behind an a, or behind another space."""
    assert open_ends(_marked("a", "▁b", "▁▁")) == WHITE_SPACE | {"▁"}
    assert open_ends(_marked("a", "a▁b", "▁▁")) == WHITE_SPACE | {"▁", "a"}


_WHOLE: dict[str, Callable[[], Tokenizer]] = {
    "a part that takes in a space": lambda: _pipeline(rf"\w+ \w+|{_WORDS}"),
    "a part that is not known": lambda: _pipeline(rf"\p{{Han}}+|{_WORDS}"),
    "nothing that takes every white space": lambda: _pipeline(r"\p{N}{1,3}"),
    "a bar within a bracket": lambda: _pipeline(r"(\s+|\p{N})"),
    "a space put before the text": lambda: _pipeline(add_prefix_space=True),
    "no pre-tokenizer": lambda: Tokenizer(BPE()),
    "words by a mark": lambda: _replaced(pre_tokenizers.Metaspace()),
    "text is stripped": lambda: _normalized(normalizers.Strip()),
    "composed by compatibility": lambda: _normalized(normalizers.NFKC()),
    "another model": lambda: _pipeline(model=WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
    "unknown tokens": lambda: _pipeline(model=BPE({"<unk>": 0}, [], unk_token="<unk>", fuse_unk=True)),
    "chance": lambda: _pipeline(model=BPE({}, [], dropout=0.1)),
    "word ends are marked": lambda: _pipeline(model=BPE({}, [], end_of_word_suffix="</w>")),
    "a token that takes in white space": lambda: _with_token(AddedToken("<b>", lstrip=True)),
    "a token that looks at its neighbours": lambda: _with_token(AddedToken("x", single_word=True)),
    "a token with a space": lambda: _with_token(AddedToken("<a b>")),
    "marks without all bytes": lambda: _marked("a", byte_fallback=False),
    "marks, and a byte goes on": lambda: _marked("<0x0A>a"),
    "marks, and known texts are not merged": lambda: _marked("a", ignore_merges=True),
}


def _replaced(pre_tokenizer: Any) -> Tokenizer:
    found = Tokenizer(BPE())
    found.pre_tokenizer = pre_tokenizer
    return found


@pytest.mark.parametrize("make", _WHOLE.values(), ids=_WHOLE)
def test_any_other_pipeline_is_given_whole_texts(make: Callable[[], Tokenizer]) -> None:
    assert open_ends(make()) is None

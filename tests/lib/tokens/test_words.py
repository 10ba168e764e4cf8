"""Ids from words are those of the whole text, for every real tokenizer; the reference is the library given the text alone."""

import random
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.tokens.cuts import WHITE_SPACE, open_ends
from lib.tokens.tokenizer import Tokenizer
from lib.tokens.words import WordEncoder
from tests.lib.tokens.conversations import random_text
from tests.lib.tokens.formats import Format, formats
from tests.parity import fuzzed

_NAMES = ("chatml", "qwen3", "gemma3", "llama3", "harmony")
_PARTS = (
    *("the", "answer.", "I'll", "WE'VE", "'s", "123", "1/2", "▁", ">", "</td>", "é", "e\u0301", "日本語", "한", "😀", "\u200d"),
    *(" ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u0085", "\u2028", "\u3000", "\x1c", "\x00", "\u0301", "/"),
)
_TEXTS = st.lists(st.text(max_size=8) | st.lists(st.sampled_from(_PARTS), max_size=12).map("".join), max_size=6)


@pytest.fixture(scope="module")
def by_name(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Format]:
    return {form.name: form for form in formats(tmp_path_factory.mktemp("formats"))}


def _whole(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [tokenizer.text_backend.encode(text, add_special_tokens=False).ids for text in texts]


def _encoder(tokenizer: Tokenizer, pieces_kept: int) -> WordEncoder:
    ends = open_ends(tokenizer.text_backend)
    assert ends is not None, f"{tokenizer.folder}: is given whole texts"
    return WordEncoder(tokenizer.text_backend, ends, pieces_kept=pieces_kept)


@pytest.mark.parametrize("name", _NAMES)
def test_ids_from_words_are_those_of_the_text(by_name: dict[str, Format], name: str) -> None:
    """[A6] Whatever is remembered of earlier texts, much, little or nothing."""
    tokenizer = by_name[name].encoder.tokenizer
    encoders = [_encoder(tokenizer, pieces_kept) for pieces_kept in (0, 8, 1 << 16)]

    @settings(max_examples=40)
    @given(_TEXTS)
    def law(texts: list[str]) -> None:
        expected = _whole(tokenizer, texts)
        assert [encoder.encode(texts) for encoder in encoders] == [expected] * 3

    law()


@pytest.mark.parametrize("name", _NAMES)
def test_every_character_may_stand_before_a_cut(by_name: dict[str, Format], name: str) -> None:
    """[A6] Latin letters, combining marks, all white space, and every 97th of Unicode: c in `ac b`, `c  b` and `c`."""
    tokenizer = by_name[name].encoder.tokenizer
    chosen = (*range(0x380), *range(0x2000, 0x2070), *range(0x380, 0xD800, 97), *range(0xE000, 0x110000, 997))
    characters = [*map(chr, chosen), *WHITE_SPACE]
    texts = [f"a{c} b\n{c}  b {c}" for c in characters]
    encoder = _encoder(tokenizer, 1 << 16)
    assert encoder.encode(texts) == _whole(tokenizer, texts)


@pytest.mark.parametrize("name", _NAMES)
def test_fuzzed_texts_have_the_ids_of_the_text(by_name: dict[str, Format], name: str) -> None:
    tokenizer = by_name[name].encoder.tokenizer
    texts = [text for text in map(fuzzed, range(18, 318)) if tokenizer.control_text.first(text) is None]
    assert tokenizer.encode_texts(texts) == _whole(tokenizer, texts)


def test_threads_share_what_is_remembered(by_name: dict[str, Format]) -> None:
    """[A13] Eight threads encode at once while words are forgotten all the time: the ids of one thread alone."""
    tokenizer = by_name["chatml"].encoder.tokenizer
    encoder = _encoder(tokenizer, 20)
    texts = [" ".join(random_text(random.Random(8 * number + part)) for part in range(8)) for number in range(200)]
    expected = _whole(tokenizer, texts)
    found: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        found[number] = [encoder.encode([text])[0] for text in texts]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [found[number] for number in range(8)] == [expected] * 8


def test_text_of_one_long_word_is_not_remembered(by_name: dict[str, Format]) -> None:
    """What is kept is bounded in number and in the length of each: a text of one word of 100,000 characters leaves nothing."""
    encoder = _encoder(by_name["chatml"].encoder.tokenizer, 1000)
    encoder.encode(["x" * 100_000, "a " + "y" * 100_000, *(f"w{number} and z{number}" for number in range(3000))])
    assert len(encoder._kept) <= 1001
    assert max(map(len, encoder._kept)) < 100

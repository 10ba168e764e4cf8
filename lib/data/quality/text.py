"""The text of an example as comparisons see it: parts, words, sequences of words as numbers, digests of content."""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from lib.core.examples import Completion, Conversation, EventSequence, Example, Message, PreferencePair, Prompt
from lib.core.manifest import canonical_json
from lib.data.schemas.arrow import to_record

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, Kana, Han: written without spaces, so each character counts as a word."""
_OPERATOR = r"[+*/=<>^%×÷]|(?<!\w)-|(?<=\d)-(?=\d)"
"""15 - 26 is not 15 + 26; the hyphen of "well-known" is none."""
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+|{_OPERATOR}")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

Part = tuple[str, str]
"""(role, text)"""


def parts(example: Example) -> Iterator[Part]:
    """Every text of an example with the role that says it; the prompt of a completion is a user's."""
    match example:
        case Conversation():
            yield from _of_messages(example.messages)
            yield from (("system", tool) for tool in example.tools)
        case Completion():
            yield from (("user", example.prompt), ("assistant", example.completion))
        case PreferencePair():
            for messages in (example.prompt, example.chosen, example.rejected):
                yield from _of_messages(messages)
        case Prompt():
            yield from _of_messages(example.messages)
            yield from (("system", tool) for tool in example.tools)
        case EventSequence():
            yield "user", " ".join(f"{event.item} {event.action}" for event in example.events)


def prompt_parts(example: Example) -> list[Part]:
    """What comes before the answer: of a conversation, all before its last assistant turn."""
    match example:
        case Conversation():
            turns = [number for number, message in enumerate(example.messages) if message.role == "assistant"]
            return list(_of_messages(example.messages[: turns[-1]]))
        case Completion():
            return [("user", example.prompt or example.completion)]
        case PreferencePair():
            return list(_of_messages(example.prompt))
    return list(parts(example))


def is_compared(part: Part) -> bool:
    """System messages are the same for many rows, and say nothing about likeness."""
    return part[0] not in ("system", "developer")


def words(text: str) -> list[str]:
    """Runs of letters, digits and marks, and operators, without regard to case and to Unicode's ways of writing the same."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-"))


def sequences(found: list[str], length: int) -> np.ndarray:
    """[num_sequences] uint64, one number for each run of `length` words; for fewer words one number for all; sorted, unique."""
    if not found:
        return np.empty(0, np.uint64)
    return np.unique(_rolled(np.fromiter(map(_word_number, found), np.uint64, len(found)), min(length, len(found))))


def whole(found: list[str]) -> int:
    """The number of a text as one sequence of all its words."""
    return int(sequences(found, len(found))[0])


def mixed(numbers: np.ndarray) -> np.ndarray:
    """uint64 to uint64, one to one, every bit depending on every bit. Source: the finaliser of splitmix64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MIX_1
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MIX_2
    mixture: np.ndarray = numbers ^ (numbers >> np.uint64(31))
    return mixture


def content_digest(example: Example) -> bytes:
    """16 bytes that stand for everything in an example but its id and its place."""
    record = {name: value for name, value in to_record(example).items() if name not in ("id", "source")}
    return _digest(type(example).__name__, canonical_json(record))


def prompt_digest(example: Example) -> bytes:
    """16 bytes that stand for what is asked: for the first turns of a conversation, up to the first answer. System messages
    count only where nothing else is asked, and the whole content where nothing is."""
    match example:
        case Conversation():
            first = next(number for number, message in enumerate(example.messages) if message.role == "assistant")
            asked = [*_of_messages(example.messages[:first])]
        case EventSequence():
            asked = [("member", example.member)]
        case _:
            asked = prompt_parts(example)
    said = [part for part in asked if is_compared(part)] or asked
    return _digest("prompt", canonical_json(said)) if said else content_digest(example)


def _digest(kind: str, text: str) -> bytes:
    return hashlib.blake2b(f"{kind}\n{text}".encode(), digest_size=16).digest()


def _of_messages(messages: tuple[Message, ...]) -> Iterator[Part]:
    for message in messages:
        if message.thinking:
            yield message.role, message.thinking
        yield message.role, message.content
        yield from ((message.role, f"{call.name} {call.arguments}") for call in message.tool_calls)


@lru_cache(1 << 16)
def _word_number(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _rolled(numbers: np.ndarray, length: int) -> np.ndarray:
    last = len(numbers) - length + 1
    total = np.full(last, np.uint64(length), np.uint64)
    for offset in range(length):
        total = total * _FACTOR + numbers[offset : offset + last]
    return mixed(total)

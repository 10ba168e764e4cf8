"""Where a text may be cut without changing its ids: proven from what a tokenizer's pipeline consists of, never by trying.

The cut is before a space that follows a character which is no white space. Two kinds of pipeline are known to keep apart
what lies left and right of it; any other is given whole texts.

Regular expressions: each alternative in _ALTERNATIVES matches a space only as its first character, or nothing but white
space. So no match goes on from another character into a space, one begins there since `\\s+` takes any, and no look-ahead
sees past it. Composing characters (NFC) changes nothing at a space.

Spaces as letters (SentencePiece): the space becomes a mark, and byte pairs are merged in the text as a whole. If no token
of the vocabulary has the mark after a character, no merge crosses the cut behind this character.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

WHITE_SPACE = frozenset(character for character in map(chr, range(0x3001)) if character.isspace())
"""All there is; the last one is the ideographic space."""
_MARK = "\u2581"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SHORTENED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ALL_WHITE = r"\s+"
_ALTERNATIVES = frozenset(
    {
        *(_SHORTENED, r"'(?i:[sdmt]|ll|ve|re)", r"'(?:[sdmt]|ll|ve|re)"),
        *(r" ?\p{L}+", r" ?\p{N}+", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r"[^\r\n\p{L}\p{N}]?\p{L}+"),
        *(rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{end}" for end in ("", f"{_SHORTENED}?")),
        *(rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{end}" for end in ("", f"{_SHORTENED}?")),
        *(rf" ?[^\s\p{{L}}\p{{N}}]+{end}" for end in ("", r"[\r\n]*", r"[\r\n/]*")),
        *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", _ALL_WHITE),
    }
)


def open_ends(backend: Backend) -> frozenset[str] | None:
    """The characters behind which a text must not be cut before a space; None where it must not be cut at all."""
    model = backend.model
    added = backend.get_added_tokens_decoder().values()
    if not isinstance(model, BPE) or model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if any(token.lstrip or token.rstrip or token.single_word or " " in token.content for token in added):
        return None
    normalizer, stages = _part(backend.normalizer), _stages(_part(backend.pre_tokenizer))
    if normalizer == {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}:
        # The pre-tokenizer finds no space any more.
        is_plain = all(stage["type"] == "Split" and stage["pattern"] == {"String": " "} for stage in stages)
        return _before_marks(backend, [token.content for token in added]) if is_plain and not model.ignore_merges else None
    is_known = normalizer in (None, {"type": "NFC"}) and model.unk_token is None
    alternatives = list(map(_alternatives_of, stages))
    if (
        is_known
        and all(found <= _ALTERNATIVES for found in alternatives)
        and any(_ALL_WHITE in found for found in alternatives)
    ):
        return WHITE_SPACE
    return None


def _before_marks(backend: Backend, added: list[str]) -> frozenset[str] | None:
    """White space, the mark itself, and every character that some token has before a mark."""
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)) or not backend.model.byte_fallback:
        return None  # unknown characters beside one another would become one token
    text = "\n".join((*vocabulary, *added))
    if re.search(r"^<0x[0-9A-F]{2}>.", text, re.MULTILINE):
        return None  # a byte goes on into a token of its own
    return WHITE_SPACE | {_MARK} | set(re.findall(f"(.){_MARK}", text))


def _part(part: Any) -> Any:
    """A stage of the pipeline as its JSON in tokenizer.json."""
    return None if part is None else json.loads(part.__getstate__())


def _stages(pre_tokenizer: Any) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _alternatives_of(stage: dict[str, Any]) -> set[str]:
    """What a stage of the pre-tokenizer cuts by; the empty pattern, which is not among those known, where that isn't clear."""
    match stage:
        case {"type": "Digits"}:
            return {r"\p{N}"}
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return {_ALL_WHITE} if use_regex else set()
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}:
            return _alternatives(pattern)
    return {""}


def _alternatives(pattern: str) -> set[str]:
    """The parts of a regular expression between bars that are in no bracket."""
    found, depth = [""], 0
    for part in re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", pattern, re.DOTALL):
        depth += (part == "(") - (part == ")")
        if part == "|" and not depth:
            found.append("")
        else:
            found[-1] += part
    return set(found)

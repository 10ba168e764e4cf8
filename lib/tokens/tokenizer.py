"""The one tokenizer: what AutoTokenizer makes of a folder, proven to say what its tokenizer.json says."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from tokenizers import processors
from transformers.utils.chat_template_utils import render_jinja_template

from lib.core.errors import NO_REMOTE_CODE, TokenizerError
from lib.tokens.auto_tokenizer import AutoTokenizer
from lib.tokens.control import ControlText, control_tokens
from lib.tokens.cuts import open_ends
from lib.tokens.sandbox import template_problem
from lib.tokens.vocab_plan import planned_text_tokens
from lib.tokens.words import WordEncoder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab_plan.json",
)
"""Files of a Hugging Face folder that make its tokenizer; those present are copied and enter the digest."""

TOOL_TURN_ENDS = ("<|eom_id|>", "<|call|>")
"""Ends of a turn that calls a tool, in the formats that have one of their own (Llama 3, harmony)."""

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError)
"""What rendering a conversation raises that a chat template isn't made for."""

PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two leading spaces, a tab\tand a trailing space ",
    "line one\nline two\n\n\n  indented\r\nwindows",
    "12345678901 + 3.14159 = 0x7fff, 1,000,000 and ½",
    "naïve façade – “quotes” … €9.99",
    "日本語と中文, 한국어, Русский, العربية, עברית, हिन्दी",
    "😀 👩🏽‍🚀 🇫🇷 ❤️",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # code",
    "I'll don't WE'VE it's",
    "a" * 200,
)
"""Text in Unicode's composed form (NFC), so that a tokenizer that composes must still return it unchanged."""


@dataclass(frozen=True)
class Tokenizer:
    """A checked tokenizer of a folder; make one with `Tokenizer.load`.

    Encoding holds no state that a call changes, so one value may serve several threads.
    """

    folder: Path
    template: str | None = field(repr=False)
    """The Jinja chat template; None where the folder has none."""
    special_tokens: dict[str, str]
    """Variables that the template may use, such as bos_token."""
    backend: tokenizers.Tokenizer
    """AutoTokenizer's pipeline, without truncation and padding, and with untrimmed character offsets."""
    text_backend: tokenizers.Tokenizer
    """The same, but blind to control tokens: a text that spells one becomes plain text."""
    control_tokens: dict[str, int] = field(repr=False)
    """Text -> id of the added tokens that are instructions to the model, flagged special or not."""
    prefix_ids: tuple[int, ...]
    """What the pipeline puts before a text of its own accord, such as a begin token; chat templates write their own."""
    vocab_size: int
    """One more than the greatest id, added tokens included."""
    eos_id: int
    pad_id: int
    """Fills slots that hold no token. May equal `eos_id`; nothing decides by comparing ids with it."""
    bos_id: int | None

    @staticmethod
    def load(folder: Path) -> "Tokenizer":
        """Read and check a Hugging Face tokenizer folder.

        Raises:
            TokenizerError: a file is missing, code of its own is asked for, AutoTokenizer says other ids than tokenizer.json,
                text doesn't come back unchanged, or the chat template is no program to be trusted with memory and time.
        """
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (folder / name).is_file():
                raise TokenizerError(f"{folder}: no {name}; pass a Hugging Face folder with a fast tokenizer")
        _refuse_remote_code(folder)
        try:
            raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            auto: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            template = auto.get_chat_template() if auto.chat_template else None
        except Exception as error:  # the libraries raise anything here, Exception itself included
            raise TokenizerError(f"{folder}: the tokenizer can't be opened: {error}") from error
        if auto.eos_token_id is None:
            raise TokenizerError(f"{folder}: tokenizer_config.json names no eos_token; add it")
        special = {name: str(token) for name, token in auto.special_tokens_map.items() if isinstance(token, str)}
        if template is not None:
            problem = template_problem(template, tuple(sorted(special.items())))
            if problem is not None:
                raise TokenizerError(f"{folder}: the chat template {problem} on a small sample; don't use this template")
        backend = _pure_pipeline(auto.backend_tokenizer)
        _check_ids(folder, auto, raw, backend)
        control = control_tokens(backend.get_added_tokens_decoder(), template or "", planned_text_tokens(folder))
        return Tokenizer(
            folder=folder,
            template=template,
            special_tokens=special,
            backend=backend,
            text_backend=_without_control(folder, backend, control),
            control_tokens=control,
            prefix_ids=_prefix_ids(raw),
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
            eos_id=auto.eos_token_id,
            pad_id=auto.eos_token_id if auto.pad_token_id is None else auto.pad_token_id,
            bos_id=auto.bos_token_id,
        )

    @cached_property
    def digest(self) -> str:
        """Sha256 (hex) over name and bytes of each file in TOKENIZER_FILES that is there."""
        whole = hashlib.sha256()
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                content = (self.folder / name).read_bytes()
                whole.update(f"{name} {len(content)}\n".encode() + content)
        return whole.hexdigest()

    @cached_property
    def control_text(self) -> ControlText:
        """Finds control tokens in text."""
        return ControlText(self.control_tokens)

    @cached_property
    def _words(self) -> WordEncoder | None:
        ends = open_ends(self.text_backend)
        return None if ends is None else WordEncoder(self.text_backend, ends)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end generation: the token that closes a turn in the chat template, eos, and those that hand over to a tool.

        Raises:
            TokenizerError: the template closes a turn with no token of its own.
        """
        closing = [turn_end(self)] if self.template is not None else []
        closing += [token for token in TOOL_TURN_ENDS if token in self.control_tokens]
        return tuple(dict.fromkeys((*(self.control_tokens[token] for token in closing), self.eos_id)))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special tokens added; a control token in it becomes its id."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text that may spell control tokens and holds none."""
        return list(self.text_backend.encode(text, add_special_tokens=False).ids)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_text` of many texts in one call, without the cost of character offsets; from words where that is exact."""
        if self._words is not None:
            return self._words.encode(texts)
        return [encoding.ids for encoding in self.text_backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_batch(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Ids and character offsets of many texts in one call, no special tokens added."""
        return self.backend.encode_batch(list(texts), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], skip_special: bool = False) -> str:
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special)

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files byte for byte, so that what is served is what was trained with."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)

    def render(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        """Text of a conversation by the chat template; raises what Jinja raises."""
        if self.template is None:
            raise TokenizerError(f"{self.folder}: has no chat template; set config.data.chat_format")
        rendered, _ = render_jinja_template(
            conversations=[list(messages)], chat_template=self.template, **(self.special_tokens | variables)
        )
        return str(rendered[0])


def turn_end(tokenizer: Tokenizer) -> str:
    """Text of the control token that closes an assistant turn in the chat template."""
    answer = "answer-of-the-probe"
    probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    # A date has the same length whatever it is, and nothing here depends on it.
    try:
        text = tokenizer.render(probe, strftime_now=lambda _: "2024-07-26")
    except TEMPLATE_ERRORS as error:
        raise TokenizerError(
            f"{tokenizer.folder}: the chat template does not take a question and its answer: {error}; use another template "
            "or config.data.chat_format"
        ) from error
    after = text.partition(answer)[2]
    found = [token for token in tokenizer.control_tokens if after.startswith(token)]
    if not found:
        raise TokenizerError(
            f"{tokenizer.folder}: the chat template puts {after[:40]!r} after an assistant's answer, not a token of its own; "
            "a model could not learn to stop; use a template that closes each turn (such as ChatML)"
        )
    return max(found, key=len)


def _pure_pipeline(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that never cuts or pads, and whose offsets keep a token's leading space."""
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    # Offsets decide the loss mask. The post-processor is the only stage that moves them; no other use is made of it,
    # since special tokens come from the template alone.
    copy.post_processor = processors.ByteLevel(trim_offsets=False)
    return copy


def _without_control(folder: Path, backend: tokenizers.Tokenizer, control: dict[str, int]) -> tokenizers.Tokenizer:
    """A copy that doesn't recognise the control tokens. Raises TokenizerError where it does all the same."""
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    known = backend.get_added_tokens_decoder()
    tokens = [known[token_id] for token_id in control.values()]
    if trimming := [token.content for token in tokens if token.lstrip or token.rstrip or token.single_word]:
        raise TokenizerError(
            f"{folder}: the control token {trimming[0]!r} swallows white space beside it, so masks would be wrong"
        )
    copy.add_special_tokens(
        [tokenizers.AddedToken(token.content, special=True, normalized=token.normalized) for token in tokens]
    )
    copy.encode_special_tokens = True
    for text, encoding in zip(control, copy.encode_batch_fast(list(control), add_special_tokens=False)):
        if control[text] in encoding.ids:
            raise TokenizerError(f"{folder}: the text {text!r} can't be kept from becoming the control token of that name")
    return copy


def _prefix_ids(raw: tokenizers.Tokenizer) -> tuple[int, ...]:
    with_specials, plain = raw.encode("x", add_special_tokens=True).ids, raw.encode("x", add_special_tokens=False).ids
    return tuple(with_specials[: with_specials.index(plain[0])])


def _refuse_remote_code(folder: Path) -> None:
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{folder / 'tokenizer_config.json'}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise TokenizerError(f"{folder / 'tokenizer_config.json'}: holds a {type(settings).__name__}, expected an object")
    if "auto_map" in settings:
        raise TokenizerError(f"{folder / 'tokenizer_config.json'}: {NO_REMOTE_CODE}")


def _check_ids(folder: Path, auto: Any, raw: tokenizers.Tokenizer, backend: tokenizers.Tokenizer) -> None:
    """AutoTokenizer can silently rebuild the pipeline when the class in the config disagrees with tokenizer.json."""
    for text in PROBE_TEXTS:
        wanted = raw.encode(text, add_special_tokens=False).ids
        for who, ids in (
            ("AutoTokenizer", auto(text, add_special_tokens=False)["input_ids"]),
            ("the checked pipeline", backend.encode(text, add_special_tokens=False).ids),
        ):
            if list(ids) != list(wanted):
                raise TokenizerError(
                    f"{folder}: {who} turns {text[:40]!r} into {list(ids)[:8]}, tokenizer.json into {list(wanted)[:8]}; "
                    "correct tokenizer_class in tokenizer_config.json"
                )
        back = auto.decode(wanted, clean_up_tokenization_spaces=False)
        if back != text or backend.decode(wanted, skip_special_tokens=False) != text:
            raise TokenizerError(
                f"{folder}: {text[:40]!r} comes back as {back[:40]!r} after encoding and decoding; "
                "the tokenizer loses text, so its tokenizer.json is incomplete or damaged"
            )

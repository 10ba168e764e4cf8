"""Conversations to token ids with a loss mask, through the tokenizer's own chat template."""

import html
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal

import tokenizers

from lib.core.errors import DataError
from lib.core.examples import Conversation, Encoded
from lib.tokens.templates import mark_assistant
from lib.tokens.tokenizer import Tokenizer

TrainOn = Literal["all_assistant_turns", "last_assistant_turn"]

_Span = tuple[int, int]


class ChatEncoder:
    """Encodes conversations with one tokenizer.

    Trained are the tokens of the assistant's content and the token that ends its turn; neither the header before it nor
    the newline after it. The mask comes from character positions in the rendered text, never from values of ids, so a
    padding token that equals the end of turn changes nothing.
    """

    def __init__(self, tokenizer: Tokenizer, train_on: TrainOn = "all_assistant_turns") -> None:
        """Raises TokenizerError when the chat template can't be marked."""
        self.tokenizer = tokenizer
        self.train_on = train_on
        self._template = mark_assistant(tokenizer)
        self._control_ids = frozenset(tokenizer.control_tokens.values())
        self._control_text = re.compile("|".join(map(re.escape, tokenizer.control_tokens)))
        self._num_control: dict[tuple[str, ...], int] = {}

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Encode many conversations in one call of the tokenizer.

        Returns: one Encoded for each, in order; `token_ids` equal apply_chat_template(tokenize=True).
        Raises:
            DataError: a message holds a control token, or nothing in a conversation would be trained; names source and id.
        """
        texts, spans = [], []
        for conversation in conversations:
            self._refuse_control_tokens(conversation)
            text, found = self.tokenizer.render(self._template, _plain(conversation), return_assistant_tokens_mask=True)
            texts.append(text)
            spans.append(found if self.train_on == "all_assistant_turns" else found[-1:])
        encodings = self.tokenizer.encode_batch(texts)
        return [self._encoded(*item) for item in zip(conversations, encodings, spans)]

    def render_prompt(self, conversation: Conversation) -> list[int]:
        """Ids up to and including the header of the last assistant turn: what a model is given to write that turn.

        They are what training saw before its answer, unless the answer starts with white space that the tokenizer merges
        with the newline of the header; such a merged token is not trained.

        Raises:
            DataError: no assistant turn, or a message holds a control token.
        """
        self._refuse_control_tokens(conversation)
        roles = [message.role for message in conversation.messages]
        if "assistant" not in roles:
            raise DataError(f"{conversation.source}: row {conversation.sample_id!r} has no assistant turn to answer")
        last = len(roles) - 1 - roles[::-1].index("assistant")
        text, _ = self.tokenizer.render(self.tokenizer.template, _plain(conversation)[:last], add_generation_prompt=True)
        return self.tokenizer.encode(text)

    def preview_html(self, encoded: Encoded) -> str:
        """The text of an encoded conversation as HTML, trained parts within `<span class="trained">`; all text escaped."""
        parts = []
        for trained, run in groupby(zip(encoded.token_ids, encoded.loss_mask), key=lambda pair: pair[1]):
            text = html.escape(self.tokenizer.decode([token_id for token_id, _ in run]))
            style = ' class="trained" style="background:#c8f0c8"' if trained else ""
            parts.append(f"<span{style}>{text}</span>")
        return f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(parts)}</div>'

    def _encoded(self, conversation: Conversation, encoding: tokenizers.Encoding, spans: Sequence[_Span]) -> Encoded:
        token_ids = list(encoding.ids)
        num_control = sum(map(self._control_ids.__contains__, token_ids))
        if num_control != self._expected_control(conversation):
            raise DataError(
                f"{conversation.source}: row {conversation.sample_id!r}: its text turns into control tokens of the template; "
                "remove them from the messages"
            )
        mask = _mask(encoding.offsets, spans)
        if not any(mask):
            raise DataError(f"{conversation.source}: row {conversation.sample_id!r} has nothing to train on; give it an answer")
        return Encoded(conversation.sample_id, token_ids, mask)

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        for number, message in enumerate(conversation.messages, start=1):
            if found := self._control_text.search(message.content):
                raise DataError(
                    f"{conversation.source}: row {conversation.sample_id!r}: message {number} ({message.role}) holds the "
                    f"control token {found[0]!r}, which the tokenizer would read as an instruction; remove it from the text"
                )

    def _expected_control(self, conversation: Conversation) -> int:
        """Control tokens that the template itself writes for these roles: counted once on neutral text."""
        roles = tuple(message.role for message in conversation.messages)
        if roles not in self._num_control:
            text, _ = self.tokenizer.render(self._template, [{"role": role, "content": "x"} for role in roles])
            self._num_control[roles] = sum(map(self._control_ids.__contains__, self.tokenizer.encode(text)))
        return self._num_control[roles]


def _plain(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def _mask(offsets: Sequence[_Span], spans: Sequence[_Span]) -> list[bool]:
    """[T] True where a token lies within one of the spans.

    A token that also covers characters before the span (a newline of the header merged with one of the content) is not
    trained: at inference the header is given, so that token is never asked for.
    """
    remaining: Iterator[_Span] = iter(spans)
    start, stop = next(remaining, (0, 0))
    mask = []
    for token_start, token_stop in offsets:
        while token_start >= stop and (span := next(remaining, None)) is not None:
            start, stop = span
        mask.append(start <= token_start and token_stop <= stop)
    return mask

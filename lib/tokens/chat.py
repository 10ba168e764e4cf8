"""Conversations to token ids with a loss mask, in the chat format that a model is served with."""

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lib.config.chat import ChatConfig
from lib.core.errors import ConfigError, DataError, TokenizerError
from lib.core.examples import Conversation, Encoded, Message
from lib.tokens.harmony import HarmonyFormat
from lib.tokens.jinja_format import JinjaFormat
from lib.tokens.layout import ChatFormat, FormatRefused, Layout, Shape, text_of, turn_of
from lib.tokens.program import NO_TURN, Fixed, Program, Run, compile_layout, place_tokens
from lib.tokens.rules import ChatRules, TrainOn, turn_weights
from lib.tokens.runs import RunEncoder, said
from lib.tokens.table_format import TableFormat
from lib.tokens.tokenizer import Tokenizer

_QUIET_ROLES = frozenset({"system", "developer"})
_SHAPES_KEPT = 4096
_CHECKED_AT_FIRST, _CHECKED_EVERY = 4, 256
"""Of the conversations of one shape, the first few and then one in so many are also encoded whole, and must be equal."""


@dataclass(frozen=True)
class Chat:
    """A conversation to encode."""

    sample_id: str
    messages: Sequence[Message]
    tools: tuple[str, ...]
    source: str
    weights: Sequence[float]
    """[messages] factor on the loss; 0: not trained."""

    @property
    def where(self) -> str:
        """For errors."""
        return f"{self.source}: row {self.sample_id!r}"


@dataclass
class _Planned:
    """A shape's layout made ready, and how many conversations used it."""

    shape: Shape
    layout: Layout
    program: Program
    num_used: int = 0


class ChatEncoder:
    """Encodes conversations with one tokenizer; serves several threads.

    Trained are the tokens of an assistant's turn after its header, to the token that ends it; neither the header nor what
    stands between turns. The mask comes from places in the text, never from values of ids, so a padding token that equals
    the end of turn changes nothing.
    """

    def __init__(self, tokenizer: Tokenizer, rules: ChatRules | TrainOn = "all_assistant_turns") -> None:
        """Raises TokenizerError when the tokenizer's chat template can't be marked, ConfigError when the format doesn't fit."""
        self.tokenizer = tokenizer
        self.rules = rules if isinstance(rules, ChatRules) else ChatRules(train_on=rules)
        self.train_on = self.rules.train_on
        self._format = _format(tokenizer, self.rules)
        self._planned: dict[Shape, _Planned] = {}
        self._runs = RunEncoder(tokenizer, refuse_control=self.rules.control_tokens == "refuse")
        for roles in (("user",), ("user", "assistant"), ("user", "assistant", "user", "assistant")):
            self._prove(roles)

    @staticmethod
    def of(tokenizer: Tokenizer, config: ChatConfig) -> "ChatEncoder":
        """The encoder that a configuration asks for."""
        return ChatEncoder(tokenizer, ChatRules.of(config))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end generation: those that close an assistant's turn in this format, and eos."""
        closing = (self.tokenizer.control_tokens[text] for text in self._format.stop_texts())
        return tuple(dict.fromkeys((*closing, self.tokenizer.eos_id)))

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Encode many conversations in one call of the tokenizer.

        Returns: one Encoded for each, in order. Where no text spells a control token, `token_ids` equal those of
            apply_chat_template(tokenize=True).
        Raises:
            DataError: a message holds a control token (under "refuse"), the format has no way to write a conversation, or
                nothing in it would be trained; names source and id.
        """
        chats = []
        for row in conversations:
            weights = turn_weights(row.messages, self.rules, f"{row.source}: row {row.sample_id!r}")
            chats.append(Chat(row.sample_id, row.messages, row.tools, row.source, weights))
        return self.encode_chats(chats)

    def encode_chats(self, chats: Sequence[Chat]) -> list[Encoded]:
        """`encode` with the weights of messages given. Raises as it does."""
        planned = [self._plan(chat) for chat in chats]
        runs = self._encode_runs(chats, planned)
        return [self._assembled(*item) for item in zip(chats, planned, runs)]

    def render_prompt(self, conversation: Conversation) -> list[int]:
        """Ids up to and including the header of the last assistant turn: what a model is given to write that turn.

        They are what training saw before its answer, unless the answer starts with white space that the tokenizer merges
        with the newline of the header; such a merged token is not trained.

        Raises:
            DataError: no assistant turn, or a message holds a control token.
        """
        roles = [message.role for message in conversation.messages]
        where = f"{conversation.source}: row {conversation.sample_id!r}"
        if "assistant" not in roles:
            raise DataError(f"{where} has no assistant turn to answer")
        self._runs.refuse_control_tokens(conversation.messages, where)
        last = len(roles) - 1 - roles[::-1].index("assistant")
        row = conversation
        return self.prompt_ids(row.messages[:last], row.tools, source=row.source, sample_id=row.sample_id)

    def prompt_ids(self, messages: Sequence[Message], tools: tuple[str, ...] = (), *, source: str, sample_id: str) -> list[int]:
        """Ids of a conversation and the header of the turn that a model is to write next. Raises DataError, see `encode`."""
        chat = Chat(sample_id, messages, tools, source, [0.0] * len(messages))
        plan = self._plan(chat, generation=True)
        runs = iter(self._encode_runs([chat], [plan])[0])
        pieces = (item.ids if isinstance(item, Fixed) else next(runs) for item in plan.program.items)
        return list(itertools.chain.from_iterable(pieces))

    def refuse_control_tokens(self, messages: Sequence[Message], where: str) -> None:
        """Raises DataError where a message holds a control token and the rules refuse it; `where` names the row."""
        self._runs.refuse_control_tokens(messages, where)

    def preview_html(self, encoded: Encoded) -> str:
        """The text of an encoded conversation as HTML, trained parts within `<span class="trained">`; all text escaped."""
        parts = []
        for trained, run in itertools.groupby(zip(encoded.token_ids, encoded.loss_mask), key=lambda pair: pair[1]):
            text = html.escape(self.tokenizer.decode([token_id for token_id, _ in run]))
            style = ' class="trained" style="background:#c8f0c8"' if trained else ""
            parts.append(f"<span{style}>{text}</span>")
        return f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(parts)}</div>'

    def _plan(self, chat: Chat, generation: bool = False) -> _Planned:
        messages = chat.messages
        shape = Shape(tuple(map(turn_of, messages)), chat.tools, generation)
        plan = self._planned.get(shape)
        try:
            if plan is None:
                plan = self._compiled(shape, self._checked_layout(shape, chat))
                if len(self._planned) < _SHAPES_KEPT:
                    self._planned[shape] = plan
            if self.rules.control_tokens == "refuse" and any(map(self._format.special, said(messages))):
                self._runs.refuse_control_tokens(messages, chat.where)
                plan = self._compiled(shape, self._format.exact_layout(shape, messages))
        except FormatRefused as refused:
            raise DataError(f"{chat.where}: {refused}") from refused
        return plan

    def _checked_layout(self, shape: Shape, chat: Chat) -> Layout:
        spelled = next(filter(None, map(self.tokenizer.control_text.first, shape.tools)), None)
        if spelled is not None:
            raise DataError(f"{chat.where}: a tool that it offers holds the control token {spelled!r}; change the tool")
        return self._format.layout(shape)

    def _compiled(self, shape: Shape, layout: Layout) -> _Planned:
        quiet = frozenset(number for number, turn in enumerate(shape.turns) if turn.role in _QUIET_ROLES)
        program = compile_layout(layout, self.tokenizer, train_thinking=self.rules.train_thinking, quiet=quiet)
        return _Planned(shape, layout, program)

    def _encode_runs(self, chats: Sequence[Chat], planned: Sequence[_Planned]) -> list[list[list[int]]]:
        rows = [(chat.messages, plan.program) for chat, plan in zip(chats, planned)]
        return self._runs.encode(rows, lambda number: chats[number].where)

    def _assembled(self, chat: Chat, plan: _Planned, runs: Sequence[list[int]]) -> Encoded:
        weights = [*chat.weights, 0.0]
        token_ids: list[int] = []
        mask: list[bool] = []
        turns: list[tuple[int, int]] = []
        run_ids = iter(runs)
        for item in plan.program.items:
            trained = weights[item.turn] > 0.0
            if isinstance(item, Fixed):
                token_ids += item.ids
                mask += item.on if trained else item.off
            else:
                ids = next(run_ids)
                token_ids += ids
                mask += self._run_mask(item, ids, chat, weights) if trained or not item.simple else [False] * len(ids)
            turns.append((len(token_ids), item.turn))
        self._check_now_and_then(chat, plan, token_ids)
        if True not in mask:
            raise DataError(f"{chat.where} has nothing to train on; give it an answer")
        return Encoded(chat.sample_id, token_ids, mask, _token_weights(mask, turns, weights))

    def _run_mask(self, run: Run, ids: list[int], chat: Chat, weights: Sequence[float]) -> list[bool]:
        length = len(run.header_ids)
        # Ids that begin as the header's own do cover the header's characters and no others.
        if run.simple and ids[:length] == run.header_ids:
            return [False] * length + [True] * (len(ids) - length)
        _, turns = place_tokens(self.tokenizer, run, chat.messages)
        return [weights[turn] > 0.0 for turn in turns]

    def _check_now_and_then(self, chat: Chat, plan: _Planned, token_ids: list[int]) -> None:
        """Compare with the whole text, rendered and encoded in one piece."""
        plan.num_used += 1
        if plan.num_used > _CHECKED_AT_FIRST and plan.num_used % _CHECKED_EVERY:
            return
        spelled = any(self.tokenizer.control_text.first(run.text(chat.messages)) for run in plan.program.runs)
        if spelled or any(map(self._format.special, said(chat.messages))):
            return
        text = text_of(plan.layout, chat.messages)
        reference = self._format.reference(plan.shape, chat.messages)
        if reference not in (None, text):
            raise TokenizerError(f"{chat.where}: the chat template writes this row unlike others of its shape; report it")
        if self.tokenizer.encode(text) != token_ids:
            raise TokenizerError(
                f"{chat.where}: {self.tokenizer.folder} encodes the row as a whole to other ids than in parts; "
                "its pipeline looks across control tokens, which can't be masked rightly"
            )

    def _prove(self, roles: Sequence[str]) -> None:
        """Encode a sample, so that a format that doesn't work is refused before any row."""
        messages = [Message(role, f"{role} {number}") for number, role in enumerate(roles)]  # type: ignore[arg-type]
        weights = [float(role == "assistant") for role in roles]
        try:
            if any(weights):
                self.encode_chats([Chat("sample", messages, (), "sample", weights)])
            else:
                self.prompt_ids(messages, source="sample", sample_id="sample")
        except DataError as error:
            raise TokenizerError(f"{self.tokenizer.folder}: can't be trained with: {error}") from error


def _format(tokenizer: Tokenizer, rules: ChatRules) -> ChatFormat:
    if rules.chat_format == "table":
        return TableFormat(rules.chat_table or "", tokenizer)
    if rules.chat_format == "harmony":
        return HarmonyFormat(tokenizer, rules.template_date)
    if tokenizer.template is None:
        raise ConfigError(
            f"{tokenizer.folder}: has no chat template; set config.data.chat_format to 'harmony' (gpt-oss) or 'table', "
            "or add chat_template to its tokenizer_config.json"
        )
    return JinjaFormat(tokenizer, rules.template_date)


def _token_weights(mask: list[bool], turns: Sequence[tuple[int, int]], weights: Sequence[float]) -> list[float] | None:
    """[T] weight of each token, None where all trained ones have 1."""
    if all(weight in (0.0, 1.0) for weight in weights):
        return None
    found: list[float] = []
    for stop, turn in turns:
        found += [weights[turn]] * (stop - len(found))
    return [weight if kept else 0.0 for weight, kept in zip(found, mask)]


assert NO_TURN == -1, "weights[-1] is the weight of what is never trained"

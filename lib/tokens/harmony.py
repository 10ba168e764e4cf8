"""gpt-oss's harmony format, written by the rules of its specification: the tokenizer needs no chat template.

A row's first message may be a system or developer message: both are developer instructions here, as vLLM serves them; the
system message proper says who the model is and is always the same.
"""

from collections.abc import Sequence

from lib.core.errors import ConfigError
from lib.core.examples import Message
from lib.tokens.harmony_tools import tools_text
from lib.tokens.layout import FormatRefused, Layout, Segment, Shape, Slot, Turn
from lib.tokens.tokenizer import Tokenizer

_NEEDED = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>")
_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06"
_CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
_CALLS_GO = "\nCalls to these tools must go to the commentary channel: 'functions'."
_ASSISTANT = "<|start|>assistant"


class HarmonyFormat:
    """Thinking is in the channel analysis, answers in final, calls and the words before them in commentary.

    The last answer ends with <|return|>, earlier ones with <|end|>, as in a served conversation. That <|end|> is not
    trained: a model closes an answer with <|return|>, and what follows it would be what it learns to go on with.
    """

    def __init__(self, tokenizer: Tokenizer, date: str | None) -> None:
        """Raises ConfigError when the tokenizer lacks harmony's tokens."""
        missing = [token for token in _NEEDED if token not in tokenizer.control_tokens]
        if missing:
            raise ConfigError(f"{tokenizer.folder}: has no token {missing[0]!r}, so chat_format can't be 'harmony'")
        day = f"\nCurrent date: {date}" if date else ""
        self._system = f"<|start|>system<|message|>{_IDENTITY}{day}\n\nReasoning: medium\n\n{_CHANNELS}"

    def layout(self, shape: Shape) -> Layout:
        turns = shape.turns
        found = [Segment(f"{self._system}{_CALLS_GO if shape.tools else ''}<|end|>")]
        first = 1 if turns and turns[0].role in {"system", "developer"} else 0
        if first or shape.tools:
            found.append(Segment("<|start|>developer<|message|>"))
            if first and turns[0].has_content:
                found += [Segment("# Instructions\n\n"), Segment(Slot(0, "content"))]
                found += [Segment("\n\n")] if shape.tools else []
            found.append(Segment(f"{tools_text(shape.tools) if shape.tools else ''}<|end|>"))
        finals = [number for number, turn in enumerate(turns[:-1]) if turn.role == "assistant" and not turn.calls_with_id]
        last_final = finals[-1] if finals else -1
        if shape.generation and turns and turns[-1].role == "assistant":
            raise FormatRefused("the prompt ends with an assistant's turn")
        for number in range(first, len(turns)):
            found += self._message(turns, number, thinks=number > last_final)
        return tuple(found) + ((Segment(_ASSISTANT),) if shape.generation else ())

    def special(self, text: str) -> bool:
        return False

    def exact_layout(self, shape: Shape, messages: Sequence[Message]) -> Layout:
        return self.layout(shape)

    def reference(self, shape: Shape, messages: Sequence[Message]) -> None:
        return None

    def stop_texts(self) -> tuple[str, ...]:
        return ("<|return|>", "<|call|>")

    def _message(self, turns: Sequence[Turn], number: int, *, thinks: bool) -> list[Segment]:
        turn = turns[number]
        if turn.role == "user":
            return [Segment("<|start|>user<|message|>"), *_said(number), Segment("<|end|>")]
        if turn.role == "tool":
            return [
                *(Segment("<|start|>functions."), Segment(_name_of_tool(turns, number))),
                *(Segment("<|channel|>commentary to=assistant<|message|>"), *_said(number), Segment("<|end|>")),
            ]
        if turn.role == "assistant":
            return self._assistant(turn, number, last=number == len(turns) - 1, thinks=thinks)
        raise FormatRefused(f"message {number + 1} has the role {turn.role!r}, which harmony takes as the first message alone")

    def _assistant(self, turn: Turn, number: int, *, last: bool, thinks: bool) -> list[Segment]:
        if len(turn.calls_with_id) > 1:
            raise FormatRefused(f"message {number + 1} calls several tools; harmony ends a turn with one call")
        if turn.calls_with_id and turn.has_content and turn.has_thinking:
            raise FormatRefused(f"message {number + 1} has thinking and words before a call; harmony takes one of them")
        found = [Segment(_ASSISTANT)]
        if turn.has_thinking and thinks:
            found += [
                *(Segment("<|channel|>analysis<|message|>", number, True), Segment(Slot(number, "thinking"), number, True)),
                Segment(f"<|end|>{_ASSISTANT}", number, True),
            ]
        if not turn.calls_with_id:
            channel = [Segment("<|channel|>final<|message|>", number), Segment(Slot(number, "content"), number)]
            return [*found, *channel, Segment("<|return|>", number) if last else Segment("<|end|>")]
        if turn.has_content:
            found += [Segment("<|channel|>commentary<|message|>", number), Segment(Slot(number, "content"), number)]
            found.append(Segment(f"<|end|>{_ASSISTANT}", number))
        return [
            *(*found, Segment(" to=functions.", number), Segment(Slot(number, "call name"), number)),
            *(Segment("<|channel|>commentary json<|message|>", number), Segment(Slot(number, "call arguments"), number)),
            Segment("<|call|>", number),
        ]


def _said(number: int) -> list[Segment]:
    return [Segment(Slot(number, "content"))]


def _name_of_tool(turns: Sequence[Turn], number: int) -> Slot:
    """The name that a tool's result has, its own or that of the call before it."""
    if turns[number].has_name:
        return Slot(number, "name")
    if number and turns[number - 1].calls_with_id:
        return Slot(number - 1, "call name")
    raise FormatRefused(f"message {number + 1} (tool) has no name and follows no call; harmony writes the name of the tool")

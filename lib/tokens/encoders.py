"""Examples that are not conversations to token ids: completions, preference pairs, prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

from lib.core.errors import DataError
from lib.core.examples import Completion, Encoded, Message, PreferencePair, Prompt
from lib.tokens.chat import Chat, ChatEncoder


@dataclass(frozen=True)
class EncodedPair:
    """Both conversations of a preference pair; trained are the assistant's turns of the answers, not those of the prompt."""

    sample_id: str
    chosen: Encoded
    rejected: Encoded
    margin: float


@dataclass(frozen=True)
class EncodedPrompt:
    """What a policy is given to go on with."""

    sample_id: str
    token_ids: list[int]
    verifier: str
    payload: str


def encode_completions(encoder: ChatEncoder, rows: Sequence[Completion]) -> list[Encoded]:
    """Prompt and completion encoded one by one, so that a prompt has the ids that it has when served; then the end of text.

    The completion and the end of text are trained; with an empty prompt so is the whole text.

    Raises:
        DataError: a text holds a control token (under the policy "refuse"), or the completion is empty.
    """
    tokenizer = encoder.tokenizer
    for row in rows:
        where = f"{row.source}: row {row.sample_id!r}"
        if not row.completion:
            raise DataError(f"{where} has an empty completion, so nothing to train on")
        encoder.refuse_control_tokens([Message("user", row.prompt), Message("assistant", row.completion)], where)
    prompts = tokenizer.encode_texts([row.prompt for row in rows])
    completions = tokenizer.encode_texts([row.completion for row in rows])
    prefix = list(tokenizer.prefix_ids)
    found = []
    for row, prompt, completion in zip(rows, prompts, completions):
        mask = [False] * (len(prefix) + len(prompt)) + [True] * (len(completion) + 1)
        found.append(Encoded(row.sample_id, [*prefix, *prompt, *completion, tokenizer.eos_id], mask))
    return found


def encode_pairs(encoder: ChatEncoder, rows: Sequence[PreferencePair]) -> list[EncodedPair]:
    """Prompt and answer of each side encoded as one conversation, never cut out of one another's ids.

    Raises:
        DataError: see ChatEncoder.encode.
    """
    chats = [_answered(row, answer) for row in rows for answer in (row.chosen, row.rejected)]
    encoded = encoder.encode_chats(chats)
    return [
        EncodedPair(row.sample_id, chosen, rejected, row.margin)
        for row, chosen, rejected in zip(rows, encoded[::2], encoded[1::2])
    ]


def encode_prompts(encoder: ChatEncoder, rows: Sequence[Prompt]) -> list[EncodedPrompt]:
    """Each prompt with the header of the turn that the policy writes.

    Raises:
        DataError: see ChatEncoder.encode.
    """
    found = []
    for row in rows:
        ids = encoder.prompt_ids(row.messages, row.tools, source=row.source, sample_id=row.sample_id)
        found.append(EncodedPrompt(row.sample_id, ids, row.verifier, row.payload))
    return found


def _answered(row: PreferencePair, answer: Sequence[Message]) -> Chat:
    weights = [0.0] * len(row.prompt) + [float(message.role == "assistant") for message in answer]
    return Chat(row.sample_id, (*row.prompt, *answer), (), row.source, weights)

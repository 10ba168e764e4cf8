"""From conversations to prompts, and from generations to scored rows."""

import math
from collections.abc import Sequence

from lib.core.errors import DataError, GenerationError
from lib.core.examples import Conversation, Encoded
from lib.evals.report import EvalRow
from lib.rewards.base import Reward
from lib.rewards.catalogue import expected_problem
from lib.rollout.types import Generation
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer

MAX_LISTED = 20


def answerable(rows: Sequence[Conversation], verifier: str) -> list[Conversation]:
    """The rows that have an expected answer.

    Raises:
        DataError: there are none, or the verifier can't use an answer; lists the first MAX_LISTED with their places.
    """
    found = [row for row in rows if row.answer is not None]
    if not found:
        raise DataError(f"none of the {len(rows)} evaluation rows has an 'answer' to compare with; add the key to the rows")
    problems = [f"{row.source}: {problem}" for row in found if (problem := expected_problem(verifier, row.answer or ""))]
    if problems:
        raise DataError(f"{len(problems)} row(s) can't be verified by {verifier!r}\n" + "\n".join(problems[:MAX_LISTED]))
    return found


def prompts_of(rows: Sequence[Conversation], encoder: ChatEncoder, max_new_tokens: int, max_positions: int) -> list[list[int]]:
    """Token ids that ask for the last assistant turn of each row.

    Raises:
        DataError: a prompt leaves no room for max_new_tokens in the model's context.
    """
    prompts = [encoder.render_prompt(row) for row in rows]
    for row, prompt in zip(rows, prompts):
        _refuse_long(
            row, f"a prompt of {len(prompt)} tokens before {max_new_tokens} new", len(prompt) + max_new_tokens, max_positions
        )
    return prompts


def encoded_rows(rows: Sequence[Conversation], encoder: ChatEncoder, max_positions: int) -> list[Encoded]:
    """The rows as the held-out loss sees them. Raises DataError when one exceeds the model's context."""
    encoded = encoder.encode(rows)
    for row, tokens in zip(rows, encoded):
        _refuse_long(row, f"{len(tokens.token_ids)} tokens", len(tokens.token_ids), max_positions)
    return encoded


def _refuse_long(row: Conversation, what: str, num_tokens: int, max_positions: int) -> None:
    if num_tokens > max_positions:
        raise DataError(
            f"{row.source}: row {row.sample_id!r} has {what}, the model takes {max_positions}; "
            "shorten the row or lower max_new_tokens"
        )


def score_rows(
    rows: Sequence[Conversation], generations: Sequence[Generation], tokenizer: Tokenizer, reward: Reward
) -> tuple[EvalRow, ...]:
    """One scored row for each conversation, in order.

    Raises:
        GenerationError: there isn't exactly one generation for each row, of the same policy.
    """
    if len(rows) != len(generations) or len({generation.policy_digest for generation in generations}) > 1:
        raise GenerationError(f"{len(generations)} generations of several policies or for {len(rows)} rows; nothing is scored")
    return tuple(_scored(row, generation, tokenizer, reward) for row, generation in zip(rows, generations))


def _scored(row: Conversation, generation: Generation, tokenizer: Tokenizer, reward: Reward) -> EvalRow:
    assert row.answer is not None
    text = tokenizer.decode(generation.token_ids, skip_special=True)
    value = reward(text, row.answer).value
    questions = [message.content for message in row.messages if message.role == "user"]
    return EvalRow(
        id=row.sample_id,
        prompt=questions[-1] if questions else "",
        expected=row.answer,
        answer=text,
        value=value,
        correct=value == 1.0,
        stop_reason=generation.stop_reason,
        num_tokens=len(generation.token_ids),
        mean_logprob=math.fsum(generation.logprobs) / max(1, len(generation.logprobs)),
    )

"""Rows of a prompt and what is to be said to it: completions, pairs of which one is preferred, prompts with a verifier."""

import json
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from lib.core.examples import Completion, Message, PreferencePair, Prompt
from lib.data.checks import RowRefused, check_answer, check_id, check_number, check_text, json_text, kind_of
from lib.data.schemas.labels import check_labels
from lib.data.schemas.messages import check_calls_offered, check_messages, check_order, check_prompt_order, check_tools

Row = Mapping[str, Any]


def from_completion(row: Row, source: str) -> Completion:
    """`prompt` (may be empty) and `completion` as texts, and if need be `answer`, `labels` and `id`."""
    prompt, completion = check_text(row["prompt"], "prompt", blank=True), check_text(row["completion"], "completion")
    return Completion(check_id(row, source), prompt, completion, source, check_answer(row), check_labels(row))


def from_text(row: Row, source: str) -> Completion:
    """`text`, all of it trained, and if need be `labels` and `id`."""
    return Completion(check_id(row, source), "", check_text(row["text"], "text"), source, labels=check_labels(row))


def from_preference(row: Row, source: str) -> PreferencePair:
    """`chosen` and `rejected`, texts or messages, and if need be `prompt`, `margin` or both scores, and `id`.

    Messages may begin with the prompt's; without a `prompt`, what both begin with is the prompt.
    """
    chosen, rejected = _answers(row["chosen"], "chosen"), _answers(row["rejected"], "rejected")
    if row.get("prompt") is None:
        if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
            raise RowRefused("prompt is missing or null, and texts don't say where the prompt ends; give it as prompt")
        same = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected))
        prompt = tuple(first for first, _ in same)
    else:
        prompt = _prompt(row["prompt"])
    chosen, rejected = chosen[_shared(prompt, chosen) :], rejected[_shared(prompt, rejected) :]
    if chosen == rejected:
        raise RowRefused("chosen and rejected are the same")
    if not prompt:
        raise RowRefused("chosen and rejected have no first message in common, so there is no prompt; give it as prompt")
    check_prompt_order(prompt, "the prompt")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        try:
            check_order((*prompt, *answer))
        except RowRefused as refused:
            raise RowRefused(f"prompt and {name}: {refused}") from refused
    return PreferencePair(check_id(row, source), prompt, chosen, rejected, source, _margin(row))


def from_prompt(row: Row, source: str) -> Prompt:
    """`prompt` (a text or messages) and `verifier`, and `payload` (any JSON) or `answer` (a text); if need be `tools`, `id`."""
    messages = _prompt(row["prompt"])
    check_prompt_order(messages, "the prompt")
    tools = check_tools(row.get("tools"))
    check_calls_offered(messages, tools)
    return Prompt(check_id(row, source), messages, source, check_text(row["verifier"], "verifier"), _payload(row), tools)


def _payload(row: Row) -> str:
    given = [key for key in ("payload", "answer") if row.get(key) is not None]
    if len(given) != 1:
        raise RowRefused(f"has {' and '.join(given) or 'neither payload nor answer'}; a verifier needs one of the two")
    if given == ["answer"]:
        return json.dumps({"answer": check_answer(row)}, ensure_ascii=False)
    return json_text(row["payload"], "payload")


def _prompt(value: object) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("user", check_text(value, "prompt")),)
    if not isinstance(value, list):
        raise RowRefused(f"prompt is {kind_of(value)}, expected text or a list of messages")
    return check_messages(value, "prompt")


def _answers(value: object, what: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("assistant", check_text(value, what)),)
    if not isinstance(value, list):
        raise RowRefused(f"{what} is {kind_of(value)}, expected text or a list of messages")
    return check_messages(value, what)


def _shared(prompt: tuple[Message, ...], answer: tuple[Message, ...]) -> int:
    """Messages of the prompt that the answer repeats at its beginning: all of them or none."""
    return len(prompt) if answer[: len(prompt)] == prompt else 0


def _margin(row: Row) -> float:
    scores = [key for key in ("score_chosen", "score_rejected") if row.get(key) is not None]
    if len(scores) == 1 or (scores and row.get("margin") is not None):
        raise RowRefused("give margin, or score_chosen and score_rejected, or none of them")
    if scores:
        margin = check_number(row["score_chosen"], "score_chosen") - check_number(row["score_rejected"], "score_rejected")
    else:
        margin = 0.0 if row.get("margin") is None else check_number(row["margin"], "margin")
    if margin < 0.0:
        raise RowRefused(f"rejected is better than chosen by {-margin}; swap them or leave the scores out")
    return margin

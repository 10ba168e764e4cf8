"""Two-digit sums from reasoning-gym as a small conversation data set with answers that can be checked."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from reasoning_gym import create_dataset

from lib.core.errors import DataError

TRAIN_SEED, EVAL_SEED = 1_000_000, 1_000_000_000
"""reasoning-gym seeds item i with seed + i: seeds closer than the number of items give the same questions twice."""

NUMBERS = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
"""90 x 90 pairs and two operators: 16,200 questions."""
MAX_KNOWN_IN_A_ROW = 1000
SYSTEM_MESSAGE = "Add and subtract."
"""Given, so that the template doesn't put a longer one of its own before every question."""


def write_chain_sum(folder: Path, *, num_train: int, num_eval: int, progress: Callable[[int], object] | None = None) -> None:
    """Write `train.jsonl` and `eval.jsonl`; no question occurs twice, in one file or across both.

    A row is {"id", "messages": [system, question, worked answer], "answer"}. The bytes depend on the two numbers alone.
    `progress` is called with the number of rows written since the last call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    # The evaluation set comes first, so that the number of training rows doesn't change it.
    for name, seed, num_rows in (("eval", EVAL_SEED, num_eval), ("train", TRAIN_SEED, num_train)):
        questions = _questions(seed, seen)
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for number in range(num_rows):
                stream.write(json.dumps(_row(f"chain_sum-{name}-{number:05d}", next(questions))) + "\n")
                if progress:
                    progress(1)


def worked_answer(expression: str) -> str:
    """Tens, units, then both, one equation a line: "84 - 36" -> "80 - 30 = 50\\n4 - 6 = -2\\n50 - 2 = 48".

    A small model knows sums of digits; what it learns here is to take a sum apart.
    """
    left, operator, right = expression.split()
    sign = {"+": 1, "-": -1}[operator]
    (tens, units), (other_tens, other_units) = (divmod(int(term), 10) for term in (left, right))
    lines = [f"{10 * tens} {operator} {10 * other_tens} = {10 * (tens + sign * other_tens)}"]
    total, rest = 10 * (tens + sign * other_tens), units + sign * other_units
    lines.append(f"{units} {operator} {other_units} = {rest}")
    lines.append(f"{total} {'-' if rest < 0 else '+'} {abs(rest)} = {total + rest}")
    return "\n".join(lines)


def _questions(seed: int, seen: set[str]) -> Iterator[dict[str, Any]]:
    """Items of reasoning-gym from `seed` on, without those whose question is in `seen`, which is added to.

    Raises:
        DataError: so many items in a row are known that there can hardly be a new one.
    """
    # The generator is a function of seed and index; size only bounds the index.
    source = create_dataset("chain_sum", seed=seed, size=EVAL_SEED - TRAIN_SEED, **NUMBERS)
    known = 0
    for index in range(len(source)):
        item: dict[str, Any] = source[index]
        if item["question"] not in seen:
            seen.add(item["question"])
            yield item
            known = 0
        known += 1
        if known > MAX_KNOWN_IN_A_ROW:
            break
    raise DataError(f"chain_sum has only about {len(seen)} different questions; ask for fewer rows")


def _row(sample_id: str, item: dict[str, Any]) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": SYSTEM_MESSAGE},
        {"role": "user", "content": item["question"]},
        {"role": "assistant", "content": worked_answer(item["metadata"]["expression"])},
    ]
    return {"id": sample_id, "messages": messages, "answer": item["answer"]}

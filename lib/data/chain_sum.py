"""Two-digit sums from reasoning-gym as a small conversation data set with answers that can be checked."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from reasoning_gym import create_dataset

TRAIN_SEED, EVAL_SEED = 1_000_000, 1_000_000_000
"""reasoning-gym seeds item i with seed + i: seeds closer than the number of items give the same questions twice."""


def write_chain_sum(folder: Path, *, num_train: int, num_eval: int, progress: Callable[[int], object] | None = None) -> None:
    """Write `train.jsonl` and `eval.jsonl`; no question occurs twice, in one file or across both.

    A row is {"id", "messages": [question, worked answer], "answer"}. The bytes depend on the two numbers alone.
    `progress` is called with the number of rows written since the last call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    # The evaluation set comes first, so that the number of training rows doesn't change it.
    for name, seed, num_rows in (("eval", EVAL_SEED, num_eval), ("train", TRAIN_SEED, num_train)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for number, item in zip(range(num_rows), _questions(seed, seen)):
                stream.write(json.dumps(_row(f"chain_sum-{name}-{number:05d}", item)) + "\n")
                if progress:
                    progress(1)


def worked_answer(expression: str) -> str:
    """The partial sums from left to right, one equation a line: "12 + 35 - 20" -> "12 + 35 = 47\\n47 - 20 = 27"."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if operator == "+" else total - int(term)
        lines.append(f"{total} {operator} {term} = {result}")
        total = result
    return "\n".join(lines)


def _questions(seed: int, seen: set[str]) -> Iterator[dict[str, Any]]:
    """Items of reasoning-gym from `seed` on, without those whose question is in `seen`, which is added to."""
    # The generator is a function of seed and index; size only bounds the index.
    source = create_dataset("chain_sum", seed=seed, size=EVAL_SEED - TRAIN_SEED, min_digits=2, max_digits=2)
    for index in range(len(source)):
        item: dict[str, Any] = source[index]
        if item["question"] not in seen:
            seen.add(item["question"])
            yield item


def _row(sample_id: str, item: dict[str, Any]) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": item["question"]},
        {"role": "assistant", "content": worked_answer(item["metadata"]["expression"])},
    ]
    return {"id": sample_id, "messages": messages, "answer": item["answer"]}

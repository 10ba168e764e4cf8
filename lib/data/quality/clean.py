"""Which rows of a data set to keep: without duplicates, without evaluation rows, or on one side of a split."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.config.quality import CleanConfig, ContaminationConfig, SplitConfig
from lib.core.errors import DataError
from lib.core.examples import Example
from lib.data.quality.contamination import EvaluationIndex
from lib.data.quality.duplicates import Duplicates, Rows
from lib.data.quality.text import content_digest, prompt_digest

FIRST_IDS = 10


@dataclass
class Choice:
    """Which rows stay, and why the others don't."""

    kept: np.ndarray
    """[num_rows] bool"""
    reasons: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    """Reason -> rows left out, and the ids of the first FIRST_IDS."""

    def leave_out(self, reason: str, found: np.ndarray, rows: Rows) -> None:
        """Rows that are `found`, [num_rows] bool, and were not left out before."""
        indices = np.flatnonzero(found & self.kept)
        self.reasons[reason] = (len(indices), [rows[index].sample_id for index in indices[:FIRST_IDS].tolist()])
        self.kept &= ~found

    def to_json(self) -> dict[str, dict[str, Any]]:
        return {reason: {"rows": count, "first_ids": ids} for reason, (count, ids) in self.reasons.items()}


def find_duplicates(rows: Rows, examples: Iterable[Example], config: CleanConfig) -> Choice:
    """Leaves out rows that an earlier one equals or resembles, as the configuration has it.

    Args:
        examples: all of `rows` in order, read once.
    """
    duplicates = Duplicates(similarity=config.similarity, sequence_words=config.sequence_words)
    for example in examples:
        duplicates.add(example)
    choice = Choice(np.ones(len(rows), np.bool_))
    if config.exact_duplicates == "drop":
        choice.leave_out("exact_duplicate", duplicates.exact(), rows)
    if config.near_duplicates == "drop":
        choice.leave_out("near_duplicate", duplicates.near(rows, ~choice.kept), rows)
    return choice


def find_contaminated(
    rows: Rows, evaluation: Rows, config: ContaminationConfig, progress: Callable[[int], None] = lambda _: None
) -> Choice:
    """Leaves out rows that hold a row of `evaluation`."""
    index = EvaluationIndex(read_all(evaluation), config)
    found = np.zeros(len(rows), np.bool_)
    for number, example in enumerate(read_all(rows, progress)):
        found[number] = index.holds(example)
    choice = Choice(np.ones(len(rows), np.bool_))
    choice.leave_out("contaminated", found, rows)
    return choice


def held_out(rows: Rows, config: SplitConfig, progress: Callable[[int], None] = lambda _: None) -> np.ndarray:
    """[num_rows] bool, True on rows for evaluation: a function of each row's own content, whatever else is in the data set.

    Raises:
        DataError: one side would be empty.
    """
    digest = prompt_digest if config.group == "prompt" else content_digest
    chosen = (is_held_out(digest(example), config) for example in read_all(rows, progress))
    found = np.fromiter(chosen, np.bool_, len(rows))
    if found.all() or not found.any():
        raise DataError(
            f"all {len(rows)} rows fall to {'evaluation' if found.any() else 'training'} with an evaluation_fraction of "
            f"{config.evaluation_fraction}; change it or the salt, or bring more rows"
        )
    return found


def is_held_out(digest: bytes, config: SplitConfig) -> bool:
    """Whether the group that a digest stands for is for evaluation."""
    salted = hashlib.blake2b(config.salt.encode() + b"\0" + digest, digest_size=8).digest()
    number = int.from_bytes(salted, "big")
    return number < int(config.evaluation_fraction * 2**64)


def read_all(rows: Rows, progress: Callable[[int], None] = lambda _: None) -> Iterable[Example]:
    """Every row in order."""
    for index in range(len(rows)):
        progress(1)
        yield rows[index]

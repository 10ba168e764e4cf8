"""Training rows that hold an evaluation row."""

from collections.abc import Iterable
from math import ceil

import numpy as np

from lib.config.quality import ContaminationConfig
from lib.core.examples import Conversation, Example, Message, PreferencePair
from lib.data.quality.text import is_compared, parts, prompt_parts, sequences, whole, words


class EvaluationIndex:
    """The word sequences of evaluation rows. Memory: 12 bytes for each, whatever the size of the training set.

    A row of n words has n - ngram_words + 1 sequences. Questions and answers are told apart, so that a question with
    another answer is found; an answer of fewer words than a sequence says too little and is left out.
    """

    def __init__(self, rows: Iterable[Example], config: ContaminationConfig) -> None:
        self._length = config.ngram_words
        found: list[np.ndarray] = []
        for example in rows:
            found += self._texts(example)
        sizes = np.array([len(numbers) for numbers in found], np.int64)
        numbers = np.concatenate(found) if found else np.empty(0, np.uint64)
        owners = np.repeat(np.arange(len(found), dtype=np.int32), sizes)
        order = np.argsort(numbers, kind="stable")
        self._numbers, self._owners = numbers[order], owners[order]
        self._needed = np.array([ceil(size * config.share) for size in sizes], np.int64)

    def holds(self, example: Example) -> bool:
        """Whether a training row has enough of the sequences of any evaluation text."""
        numbers = self._of_training(example)
        starts, stops = (np.searchsorted(self._numbers, numbers, side) for side in ("left", "right"))
        hits = [self._owners[starts[at] : stops[at]] for at in np.flatnonzero(stops > starts)]
        if not hits:
            return False
        counts = np.bincount(np.concatenate(hits), minlength=len(self._needed))
        return bool((counts >= self._needed).any())

    def _texts(self, example: Example) -> list[np.ndarray]:
        """The sequences of the question, and of the answer where it is long enough."""
        question = [word for part in prompt_parts(example) if is_compared(part) for word in words(part[1])]
        answers = [words(text) for text in _answers(example)]
        long_answers = [sequences(answer, self._length) for answer in answers if len(answer) >= self._length]
        return ([sequences(question, self._length)] if question else []) + long_answers

    def _of_training(self, example: Example) -> np.ndarray:
        messages = [words(text) for role, text in parts(example) if is_compared((role, text))]
        short = [whole(message) for message in messages if 0 < len(message) < self._length]
        joined = [word for message in messages for word in message]
        return np.union1d(sequences(joined, self._length), np.array(short, np.uint64))


def _answers(example: Example) -> list[str]:
    match example:
        case Conversation():
            return [message.content for message in example.messages[-1:] if _is_answer(message)]
        case PreferencePair():
            return [message.content for message in (*example.chosen, *example.rejected) if _is_answer(message)]
    return [text for _, text in list(parts(example))[len(prompt_parts(example)) :]]


def _is_answer(message: Message) -> bool:
    return message.role == "assistant"

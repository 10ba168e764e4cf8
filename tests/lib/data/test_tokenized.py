"""Laws of tokenised rows: the batches of their origin, from any row on; a gap is refused."""

import random
from pathlib import Path

import numpy as np
import pytest

from lib.config.data import DataConfig
from lib.core.artifact import stage_artifact
from lib.core.errors import DataError
from lib.data import tokenized
from lib.data.batch import Document
from lib.data.mixture import OWN_DATA
from lib.data.shuffle import ExampleSource
from lib.data.stream import Encoding, PackedStream
from lib.data.tokenized import TokenizedExamples, finish, split_name, write_split
from tests.lib.data.memory import PLAIN, MemorySource, source_of

SIZES = [0, 5, 130, 1, 40]
LENGTHS = random.Random(0).choices(range(2, 60), k=53)


def _weighted(texts: list[object]) -> list[Document]:
    """Documents of a multiple of three tokens have weights, of a multiple of five labels."""

    def weighted(document: Document) -> Document:
        weights = document.loss_mask * np.float32(0.5) if document.num_tokens % 3 == 0 else None
        labels = f'{{"length": {document.num_tokens}}}' if document.num_tokens % 5 == 0 else None
        return Document(document.sample_id, document.token_ids, document.loss_mask, weights, labels=labels)

    return list(map(weighted, PLAIN.encode(texts)))


ENCODING = Encoding(_weighted, {"tokenizer": "numbers"})


def _written(source: MemorySource, folder: Path) -> TokenizedExamples:
    with stage_artifact(folder, "dataset") as staged:
        rows = {split: write_split(source, split, ENCODING, staged.path) for split in reversed(range(source.num_splits))}
        finish(staged, source, ENCODING, [rows[split] for split in range(source.num_splits)], {})
    return TokenizedExamples.open(folder)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[MemorySource, TokenizedExamples]:
    monkeypatch.setattr(tokenized, "_BATCH_ROWS", 16)
    source = source_of(SIZES, LENGTHS)
    return source, _written(source, tmp_path / "tokens")


def _content(document: Document) -> tuple[object, ...]:
    weights = None if document.weights is None else document.weights.tolist()
    return document.sample_id, document.token_ids.tolist(), document.loss_mask.tolist(), weights, document.labels


def test_every_row_is_found_from_any_row_on(pair: tuple[MemorySource, TokenizedExamples]) -> None:
    """At any start and step, the numbers, characters, tokens, masks, weights and labels of the origin."""
    source, tokens = pair
    assert tokens.num_splits == len(SIZES)
    for split, size in enumerate(SIZES):
        for start in {0, 1, 15, 16, 17, size - 1, size, size + 1} & set(range(size + 2)):
            for step in (1, 2, 7, 16, 100):
                origin = list(source.read(split, start, step))
                expected = zip(origin, ENCODING.encode([row.example for row in origin]))
                assert [(row.row, row.num_characters, _content(row.example)) for row in tokens.read(split, start, step)] == [
                    (row.row, row.num_characters, _content(document)) for row, document in expected
                ]


def test_batches_are_those_of_the_origin(pair: tuple[MemorySource, TokenizedExamples]) -> None:
    source, tokens = pair
    config = DataConfig(num_streams=4, open_packs=3, shuffle_rows=8, long_rows="split")

    def stream(examples: ExampleSource, encoding: Encoding) -> PackedStream:
        return PackedStream({OWN_DATA: examples}, encoding, config, sequence_length=32, rows_per_step=4)

    origin, stored = stream(source, ENCODING), stream(tokens, tokens.encoding)
    for _ in range(80):
        rows = [[[_content(d) for d in row.documents] for row in each.next_step().rows] for each in (origin, stored)]
        assert rows[0] == rows[1]


def test_a_missing_split_and_other_artifacts_are_refused(tmp_path: Path) -> None:
    source = source_of(SIZES, LENGTHS)
    with pytest.raises(DataError, match="split 2 of 5 was not tokenised"), stage_artifact(tmp_path / "a", "dataset") as staged:
        for split in (0, 1, 3, 4):
            write_split(source, split, ENCODING, staged.path)
        assert not (staged.path / split_name(2)).exists()
        finish(staged, source, ENCODING, SIZES, {})
    with stage_artifact(tmp_path / "b", "dataset") as staged:
        (staged.path / "x").write_text("x")
    with pytest.raises(DataError, match="expected tokenised rows"):
        TokenizedExamples.open(tmp_path / "b")

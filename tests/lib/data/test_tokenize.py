"""Rows tokenised before and rows tokenised on the way, in one mixture or alone: the same batches."""

import json
from pathlib import Path
from typing import Any

import pytest

from lib.config.data import DataConfig
from lib.core.artifact import stage_artifact
from lib.core.errors import ConfigError
from lib.data.feed import ChatFeed
from lib.data.stream import Share
from lib.data.tokenize import tokenize_conversations
from lib.data.tokenized import TokenizedExamples
from lib.tokens.chat import ChatEncoder
from tests.lib.data.datasets import ingested, row, write_jsonl

CONFIG = DataConfig(num_streams=4, open_packs=4)


def _tokenised(data: Path, encoder: ChatEncoder, target: Path) -> Path:
    with stage_artifact(target, "tokenized_dataset") as staged:
        tokenize_conversations(data, encoder.tokenizer.folder, CONFIG.chat, staged, lambda _: None)
    return target


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Every fifth row has a weight."""
    rows = [row(number, "ab 12 " * (number % 13 + 1)) for number in range(60)]
    for number in range(0, 60, 5):
        rows[number]["messages"][1]["weight"] = 0.5
    return ingested(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "data")


def _mixed(other: Path, digest: str) -> DataConfig:
    mixture = [{"name": "own"}, {"name": "other", "weight": 2.0, "location": str(other), "digest": digest}]
    return DataConfig.parse({"num_streams": 4, "open_packs": 4, "mixture": mixture}, where="test")


def _batches(config: DataConfig, own: Path, encoder: ChatEncoder) -> list[Any]:
    (stream,) = ChatFeed(config, str(own), str(encoder.tokenizer.folder), 256, 4).streams(encoder, [Share()])
    return [
        [
            (d.sample_id, d.token_ids.tolist(), d.loss_mask.tolist(), None if d.weights is None else d.weights.tolist())
            for d in packed.documents
        ]
        for _ in range(12)
        for packed in stream.next_step().rows
    ]


def test_a_mixture_of_both_kinds_has_the_batches_of_one(data: Path, tmp_path: Path, encoder: ChatEncoder) -> None:
    """[A10] Whichever of the two sources was tokenised before, and with both."""
    other = write_jsonl(tmp_path / "other.jsonl", [row(number, f"{number} " * 9) for number in range(100, 130)])
    other_data = ingested(other, tmp_path / "other")
    digests = {}
    for folder in (data, other_data):
        tokens = _tokenised(folder, encoder, tmp_path / f"tokens-{folder.name}")
        digests[tokens] = TokenizedExamples.open(tokens).digest
    own_tokens, other_tokens = digests
    other_digest = json.loads((other_data / "manifest.json").read_text(encoding="utf-8"))["digest"]
    fresh = _batches(_mixed(other_data, other_digest), data, encoder)
    assert {sample[0] for packed in fresh for sample in packed} > {"r3", "r103"}
    assert _batches(_mixed(other_data, other_digest), own_tokens, encoder) == fresh
    assert _batches(_mixed(other_tokens, digests[other_tokens]), data, encoder) == fresh
    assert _batches(_mixed(other_tokens, digests[other_tokens]), own_tokens, encoder) == fresh


def test_the_first_documents_are_the_same(data: Path, tmp_path: Path, encoder: ChatEncoder) -> None:
    """What the deck shows of a run."""
    tokens = _tokenised(data, encoder, tmp_path / "tokens")
    feeds = [ChatFeed(CONFIG, str(folder), str(encoder.tokenizer.folder), 256, 4) for folder in (data, tokens)]
    one, two = ([document.encoded() for document in feed.first_documents(encoder, 7)] for feed in feeds)
    assert one == two and [encoded.sample_id for encoded in one] == [f"r{number}" for number in range(7)]


def test_other_rules_are_refused_by_name(data: Path, tmp_path: Path, encoder: ChatEncoder) -> None:
    """[A10] Both values are told."""
    tokens = _tokenised(data, encoder, tmp_path / "tokens")
    config = CONFIG.model_copy(update={"train_on": "last_assistant_turn"})
    with pytest.raises(ConfigError, match="train_on was 'all_assistant_turns', is 'last_assistant_turn'"):
        _batches(config, tokens, ChatEncoder.of(encoder.tokenizer, config))

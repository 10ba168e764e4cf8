"""Tokenised once or on the fly: the same batches, and never those of another tokenizer, template or rule."""

import json
from pathlib import Path
from typing import Any

import pytest

from lib.config.data import DataConfig
from lib.core.codehash import reachable_modules
from lib.core.errors import ConfigError
from lib.data.feed import ChatFeed
from lib.data.stream import Share
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from tasks.artifact_type import Artifact
from tasks.artifacts import DatasetFolder, ModelFolder, TokenizerFolder
from tasks.sources import RawDataSource
from tasks.tokenize import take_tokenizer, tokenize
from tests.conftest import REPOSITORY
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer
from workflows.ingest import ingest

CONFIG = DataConfig(num_streams=4, open_packs=4)


def _data(path: Path, num_rows: int = 30) -> DatasetFolder:
    rows = []
    for number in range(num_rows):
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": f"What is {number}?" + " Say it." * (number % 4)},
            {"role": "assistant", "content": f"It is {number}."},
        ]
        if number % 3 == 0:
            turns += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes.", "weight": 0.5}]
        rows.append({"id": f"r{number}", "messages": turns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ingest(source=RawDataSource(str(path)))


def _tokenizer(folder: Path, weights: str = "w", **changes: str) -> TokenizerFolder:
    model = ModelFolder.create()
    with model.write() as staged:
        tiny_tokenizer(staged.path, **changes)
        (staged.path / "weights").write_text(weights)
    return take_tokenizer(model=model)


def _batches(data: Artifact, tokenizer: TokenizerFolder, config: DataConfig = CONFIG) -> list[Any]:
    encoder = ChatEncoder.of(Tokenizer.load(tokenizer.open()), config)
    (stream,) = ChatFeed(config, str(data.open()), str(tokenizer.open()), 128, 4).streams(encoder, [Share()])
    rows = [row for _ in range(12) for row in stream.next_step().rows]
    return [
        [
            (d.sample_id, d.token_ids.tolist(), d.loss_mask.tolist(), None if d.weights is None else d.weights.tolist())
            for d in row.documents
        ]
        for row in rows
    ]


def test_tokenised_batches_are_those_of_the_fly(fresh_home: Path, tmp_path: Path) -> None:
    """48 packed rows over several epochs: the same documents, tokens, masks and weights in the same order."""
    data, tokenizer = _data(tmp_path / "rows.jsonl"), _tokenizer(tmp_path)
    tokens = tokenize(data=data, tokenizer=tokenizer, config=CONFIG.chat)
    assert tokens.manifest().lineage == {"data": data.digest, "tokenizer": tokenizer.digest}
    assert _batches(tokens, tokenizer) == _batches(data, tokenizer)


def test_whatever_decides_tokens_decides_the_artifact(fresh_home: Path, tmp_path: Path) -> None:
    """[A10] Rows, a byte of the tokenizer, template and rules each give another one; other weights, and how rows are packed,
    don't. The hash of code sees the modules that encode. What was made otherwise is not read."""
    data, tokenizer = _data(tmp_path / "rows.jsonl"), _tokenizer(tmp_path)
    other = _tokenizer(tmp_path, template=CHATML_TEMPLATE.replace("a helpful", "an able"))
    padded = _tokenizer(tmp_path, pad_token="<|endoftext|>")
    assert _tokenizer(tmp_path, weights="others").digest == tokenizer.digest
    last = CONFIG.model_copy(update={"train_on": "last_assistant_turn"})
    base = tokenize(data=data, tokenizer=tokenizer, config=CONFIG.chat)
    made = [
        tokenize(data=data, tokenizer=other, config=CONFIG.chat),
        tokenize(data=data, tokenizer=padded, config=CONFIG.chat),
        tokenize(data=data, tokenizer=tokenizer, config=last.chat),
        tokenize(data=_data(tmp_path / "more.jsonl", 31), tokenizer=tokenizer, config=CONFIG.chat),
    ]
    assert len({base.digest, *(tokens.digest for tokens in made)}) == 5
    packed_otherwise = DataConfig(num_streams=8, open_packs=8, seed=3, shuffle_rows=1)
    assert packed_otherwise.chat == CONFIG.chat
    reached = reachable_modules(REPOSITORY, {"lib.data.tokenize"})
    assert {"lib.data.tokenized", "lib.tokens.chat", "lib.tokens.tokenizer", "lib.tokens.rules"} <= reached
    for files, config, what in ((other, CONFIG, "tokenizer"), (tokenizer, last, "train_on")):
        with pytest.raises(ConfigError, match=f"tokenised otherwise \\({what} was"):
            _batches(base, files, config)

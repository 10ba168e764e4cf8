"""Preparing a model is cached by its folder and the tokens it gets, and by nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flytekit import workflow
from flytekit.core.local_cache import LocalTaskCache
from safetensors.torch import load_file, save_file

from lib.config.vocabulary import VocabularyConfig
from lib.core.artifact import read_manifest
from lib.core.errors import ModelError
from lib.core.manifest import file_sha256
from tasks.artifacts import ModelArtifact
from tasks.prepare_model import prepare_model
from tasks.sources import ModelSource
from tests.tiny import VOCAB_SIZE, tiny_model


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("POSTFLYTE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("POSTFLYTE_LEDGER", str(tmp_path / "ledger.jsonl"))
    monkeypatch.setenv("FLYTE_LOCAL_CACHE_ENABLED", "true")
    monkeypatch.setattr("flytekit.core.local_cache.CACHE_LOCATION", str(tmp_path / "cache"))
    monkeypatch.setattr(LocalTaskCache, "_initialized", False)
    yield tmp_path / "ledger.jsonl"
    LocalTaskCache._initialized = False


@workflow
def prepare(model: ModelSource, vocabulary: VocabularyConfig) -> ModelArtifact:
    return prepare_model(source=model, vocabulary=vocabulary)


def test_tokens_from_a_few_lines_of_yaml_are_part_of_the_key(ledger: Path, tmp_path: Path) -> None:
    """Control tokens, a range, a description and vectors go through Flyte's types; the same again is a hit, another token or
    other vectors are not; vectors that changed under their digest are refused."""
    source, vectors = tiny_model(tmp_path / "source"), tmp_path / "vectors.safetensors"
    save_file({"embed": torch.full((3, 64), 0.5)}, vectors)
    values = {
        "special": ["<|member|>"],
        "ranges": [{"pattern": "<item_{}>", "count": 3}],
        "descriptions": {"<|member|>": "the sum"},
        "vectors": str(vectors),
        "vectors_digest": file_sha256(vectors),
    }
    config, other = (
        VocabularyConfig.parse({**values, "special": tokens}, where="test")
        for tokens in (["<|member|>"], ["<|member|>", "<|b|>"])
    )
    found = [prepare(model=str(source), vocabulary=given).open() for given in (config, config, other)]
    events = [json.loads(line)["event"] for line in ledger.read_text(encoding="utf-8").splitlines()]
    assert events == ["executed", "cached", "executed"]
    assert read_manifest(found[0]).counts["rows_given"] == 3
    rows = load_file(found[0] / "model.safetensors")["model.embed_tokens.weight"]
    assert rows.shape[0] == VOCAB_SIZE + 4 and bool((rows[VOCAB_SIZE + 1 :] == 0.5).all())
    save_file({"embed": torch.full((3, 64), 0.25)}, vectors)
    assert prepare(model=str(source), vocabulary=config).open() == found[0]
    with pytest.raises(ModelError, match="holds other bytes than vectors_digest says"):
        prepare(model=str(tiny_model(tmp_path / "another", seed=1)), vocabulary=config)

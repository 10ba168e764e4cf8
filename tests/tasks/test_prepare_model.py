"""Preparing a model is cached by its folder and the tokens it gets, and by nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flytekit import workflow
from safetensors.torch import load_file, save_file

from lib.config.vocabulary import VocabularyConfig
from lib.core.artifact import read_manifest
from lib.core.errors import ModelError, TokenizerError
from lib.core.manifest import file_sha256
from tasks.artifacts import ModelArtifact
from tasks.prepare_model import prepare_model
from tasks.sources import ModelSource
from tests.flyte_cache import own_cache
from tests.lib.models.test_hf_fallback import fallback_model
from tests.tiny import VOCAB_SIZE, tiny_model


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Path]:
    with own_cache(tmp_path) as ledger:
        yield ledger


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


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_refused_and_never_runs(tmp_path: Path, fresh_home: Path, kind: str, name: str) -> None:
    """[L3] At the one door that model folders come through, of a family or without one; the error names the file, says that
    nothing allows it, and what to do."""
    source = tiny_model(tmp_path / "source") if kind == "llama" else fallback_model(tmp_path / "source", kind)
    (source / "payload.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "payload.Any")
    values = json.loads((source / name).read_text(encoding="utf-8"))
    (source / name).write_text(json.dumps(values | {"auto_map": auto_map}), encoding="utf-8")
    with pytest.raises((ModelError, TokenizerError), match=rf"{name}: .*no setting allows it.*delete auto_map"):
        prepare(model=str(source), vocabulary=VocabularyConfig())
    assert not (tmp_path / "ran").exists()

"""An import that lost weights, the digit split or the begin token is stopped."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.core.errors import ModelError, TokenizerError
from lib.models.import_check import check_begin_token, check_import
from tests.tiny import tiny_model, tiny_tokenizer


def change_config(folder: Path, **changes: object) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_a_model_that_knows_nothing_is_above_the_bound(tmp_path: Path) -> None:
    """Random weights give a perplexity of about the vocabulary's size (384) or more."""
    folder = tiny_model(tmp_path)
    with pytest.raises(ModelError, match="above 20"):
        check_import(folder, max_perplexity=20.0)
    assert 100 < check_import(folder, max_perplexity=1e9) < 1e9


def test_weights_that_are_not_numbers_are_above_every_bound(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"model.norm.weight": torch.full_like(weights["model.norm.weight"], torch.nan)}, folder / "model.safetensors"
    )
    with pytest.raises(ModelError, match="nan"):
        check_import(folder, max_perplexity=1e9)


def test_a_class_that_rewrites_the_pipeline_is_found(tmp_path: Path) -> None:
    folder = change_config(tiny_model(tmp_path), tokenizer_class="LlamaTokenizer")
    with pytest.raises(TokenizerError):
        check_import(folder, max_perplexity=1e9)


def test_a_begin_token_is_added_exactly_when_it_is_declared(tmp_path: Path) -> None:
    check_begin_token(tiny_tokenizer(tmp_path))
    with pytest.raises(TokenizerError, match="lacks a begin token"):
        check_begin_token(change_config(tmp_path, add_bos_token=True))

"""A model with added tokens is trained like any other, and comes out with the rows of its ids alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.config.vocabulary import VocabularyConfig
from lib.core.artifact import read_manifest, stage_artifact
from lib.data.rows import ingest_dataset
from lib.models.admit import admit_model, prepare_model
from lib.models.verify import build_logit_report
from lib.tokens.tokenizer import Tokenizer
from tests.lib.recipes.conftest import Inputs, job, metrics, train
from tests.tiny import VOCAB_SIZE, tiny_model

VOCABULARY = {"special": ["<|pad|>"], "ranges": [{"pattern": "<item_{}>", "count": 4}], "pad_token": "<|pad|>"}


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_are_trained_and_exported_and_padding_stays_in_memory(tmp_path: Path, tied: bool) -> None:
    """[D2] [D6] [D10] Rows that name items are learnt; the export has a row for each id, opens in transformers with the same
    tokenizer and is admitted again; in the training state the rows beyond are zero, weights and moments alike."""
    with stage_artifact(tmp_path / "model", "model") as staged:
        source = tiny_model(tmp_path / "source", tie_word_embeddings=tied, dtype="float32")
        prepare_model(source, VocabularyConfig.parse(VOCABULARY, where="test"), staged)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"after <item_{n % 3}>"},
                {"role": "assistant", "content": f"<item_{(n + 1) % 3}>"},
            ]
        }
        for n in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with stage_artifact(tmp_path / "data", "dataset") as staged:
        ingest_dataset(tmp_path / "rows.jsonl", staged)
    digest = read_manifest(tmp_path / "model").digest
    report = build_logit_report(tmp_path / "model", num_configs=0).model_copy(update={"model_digest": digest})
    assert report.passed
    train(Inputs(tmp_path / "model", tmp_path / "data", report), job(steps=4, optim={"weight_decay": 0.1}), tmp_path)
    steps, out = metrics(tmp_path / "checkpoint"), tmp_path / "checkpoint" / "hf"
    assert steps[-1]["loss"] < steps[0]["loss"]

    before, after = load_file(tmp_path / "model" / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {name: tensor.shape for name, tensor in before.items()}
    name = "model.embed_tokens.weight"
    assert after[name].shape[0] == json.loads((out / "config.json").read_text())["vocab_size"] == VOCAB_SIZE + 5
    assert bool((after[name][VOCAB_SIZE + 1 : VOCAB_SIZE + 4] != before[name][VOCAB_SIZE + 1 : VOCAB_SIZE + 4]).any(1).all())
    state = {
        key: value
        for path in (tmp_path / "checkpoint" / "state").glob("*.safetensors")
        for key, value in load_file(path).items()
    }
    padded = {
        key: value for key, value in state.items() if key.endswith(("embed.weight", "decoder.head.weight")) and value.ndim == 2
    }
    assert len(padded) == (3 if tied else 6)  # weight and two moments
    for value in padded.values():
        assert value.shape[0] == VOCAB_SIZE + 64 and not value[VOCAB_SIZE + 5 :].any()

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("<item_0>", add_special_tokens=False)["input_ids"] == [VOCAB_SIZE + 1]
    assert tokenizer.pad_token_id == VOCAB_SIZE == json.loads((out / "generation_config.json").read_text())["pad_token_id"]
    logits = AutoModelForCausalLM.from_pretrained(out)(torch.arange(9)[None], use_cache=False).logits
    assert logits.shape[-1] == VOCAB_SIZE + 5
    with stage_artifact(tmp_path / "again", "model") as staged:
        admit_model(out, staged)
    digests = {Tokenizer.load(folder).digest for folder in (tmp_path / "model", out, tmp_path / "again")}
    assert len(digests) == 1, "the plan travels too: without it rows that hold an item are refused"

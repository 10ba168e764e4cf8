"""The whole workflow on a tiny model: real Ray, real FSDP2 on two ranks, real vLLM, real MLflow, and the real cache."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lib.config.evaluation import EvalConfig
from lib.config.recipes import SftConfig
from lib.core.artifact import read_manifest, verify
from lib.core.errors import DataError
from tests.flyte_cache import take_events
from tests.tiny import VOCAB_SIZE, tiny_tokenizer
from workflows.sft import sft

STEPS = 6
INGESTED = ("ingest_shard", "merge_shards")
CONFIG = SftConfig.parse(
    {
        "data": {"num_streams": 4, "open_packs": 2},
        "model": {"compute_dtype": "float32"},
        "optim": {"warmup_steps": 2},
        "train": {"checkpoint_every": 4},
    },
    where="test",
)
EVALUATION = EvalConfig(max_new_tokens=4, max_rows=16, kv_cache_gib=0.1, engine_threads=1, num_samples_shown=3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A two-layer llama with random weights, and sums of small numbers."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_tokenizer(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name, numbers in (("train", range(12)), ("eval", range(20, 24))):
        rows = [
            {
                "messages": [{"role": "user", "content": f"{a} + {b}?"}, {"role": "assistant", "content": str(a + b)}],
                "answer": str(a + b),
            }
            for a in numbers
            for b in numbers
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return {
        "model": str(folder / "model"),
        "train_data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "eval.jsonl"),
        "learning_rate": 3e-3,
        "steps": STEPS,
        "sequence_length": 128,
        "config": CONFIG,
        "evaluation": EVALUATION,
    }


@pytest.fixture(scope="module")
def outputs(inputs: dict[str, Any], ledger: Path) -> Any:
    """What the first run hands over."""
    return sft(**inputs)


def test_the_run_hands_over_a_model_that_transformers_opens(outputs: Any) -> None:
    """Six steps moved every weight, and the checkpoint says what it was made from."""
    folder = outputs.model.open()
    AutoModelForCausalLM.from_pretrained(folder)
    checkpoint = verify(outputs.checkpoint.open(), "checkpoint")
    assert checkpoint.lineage.keys() >= {"model", "data", "job", "logit_report"}
    assert checkpoint.counts["steps"] == STEPS
    assert read_manifest(folder).lineage["checkpoint"] == checkpoint.digest


def test_the_report_says_it_all(outputs: Any) -> None:
    """Numbers for programs; curves, packing, mask, answers and lineage for people, in one file without links."""
    folder = outputs.report.open()
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["num_eval"] == 16
    assert summary["loss_last"] < summary["loss_first"]
    assert 0 < summary["packing_efficiency"] <= 1
    page = (folder / "report.html").read_text(encoding="utf-8")
    for part in ("Learning rate", "Slots filled", 'class="trained"', "Sample answers", summary["checkpoint_digest"]):
        assert part in page
    assert "http://" not in page
    assert "<script" not in page


def test_an_unchanged_rerun_executes_nothing_and_a_change_only_what_it_touches(
    outputs: Any, inputs: dict[str, Any], ledger: Path
) -> None:
    """Training refuses rows longer than eight tokens, so the changed run ends there; all before it is a hit."""
    take_events(ledger)
    again = sft(**inputs)
    assert again.report.uri == outputs.report.uri
    assert {event for event, _ in take_events(ledger)} == {"cached"}
    with pytest.raises(DataError):
        sft(**{**inputs, "sequence_length": 8})
    events = take_events(ledger)
    assert events[0] == ("executed", "check_job")
    assert events[1:] == [("cached", task) for task in (*INGESTED, *INGESTED, "prepare_model", "verify_model", "evaluate")]

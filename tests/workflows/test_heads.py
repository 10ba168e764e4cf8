"""The workflow of output heads on a tiny model: real Ray, real MLflow, and the real cache."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lib.config.evaluation import HeadsEvalConfig
from lib.config.model import ModelConfig
from lib.config.recipes import HeadsRecipeConfig
from lib.core.artifact import read_manifest, verify
from lib.core.errors import ConfigError, DataError
from lib.models.heads import initial_weight
from tests.flyte_cache import take_events
from tests.local_ray import ray_here as ray_here
from tests.tiny import tiny_model
from workflows.heads import heads

STEPS, SEED, LABELS = 4, 7, ["negative", "positive"]
INGESTED = ("ingest_shard", "merge_shards")
CONFIG = HeadsRecipeConfig.parse(
    {
        "heads": [{"name": "sign", "kind": "classification", "labels": LABELS}],
        "data": {"num_streams": 4, "open_packs": 2},
        "model": {"compute_dtype": "float32"},
        "optim": {"warmup_steps": 1},
        "train": {"checkpoint_every": 4, "seed": SEED},
        "cluster": {"cpu_ranks_per_node": 1},
    },
    where="test",
)


def _rows(numbers: range) -> list[dict[str, Any]]:
    return [
        {
            "messages": [{"role": "user", "content": f"{a} - {b}?"}, {"role": "assistant", "content": str(a - b)}],
            "labels": {"sign": LABELS[a >= b]},
        }
        for a in numbers
        for b in numbers
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A random llama in float32, and differences of small numbers labelled by their sign."""
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "model": str(tiny_model(folder / "model", dtype="float32")),
        "train_data": _write(folder / "train.jsonl", _rows(range(10))),
        "eval_data": _write(folder / "eval.jsonl", _rows(range(20, 24))),
        "learning_rate": 1e-3,
        "steps": STEPS,
        "sequence_length": 192,
        "config": CONFIG,
        "evaluation": HeadsEvalConfig(max_rows=10),
    }


@pytest.fixture(scope="module")
def outputs(inputs: dict[str, Any], ledger: Path, ray_here: None) -> Any:
    """What the first run hands over."""
    return heads(**inputs)


@torch.no_grad()
def _scores(folder: Path, rows: list[dict[str, Any]], weight: torch.Tensor | None = None) -> tuple[float, float]:
    """Mean loss and share of right labels as transformers has them, a row at a time, with its own chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS), dtype=torch.float32)
    if weight is not None:
        model.score.weight.data = weight
    losses, right = [], []
    for row in rows:
        ids = tokenizer.apply_chat_template(row["messages"], return_tensors="pt", return_dict=True)["input_ids"]
        logits, label = model(ids, use_cache=False).logits, LABELS.index(row["labels"]["sign"])
        losses.append(float(cross_entropy(logits, torch.tensor([label]))))
        right.append(int(logits.argmax()) == label)
    return sum(losses) / len(losses), sum(right) / len(right)


def test_scores_are_those_of_transformers_head(outputs: Any, inputs: dict[str, Any]) -> None:
    """After training, of the exported folder as transformers opens it; before, of the source under the head that a name and a
    seed begin with. The first ten of sixteen held-out rows."""
    folder = outputs.model.open()
    summary = json.loads((outputs.report.open() / "summary.json").read_text(encoding="utf-8"))
    sign, rows = summary["heads"]["sign"], _rows(range(20, 24))[:10]
    assert summary["num_eval"] == sign["num_targets"] == len(rows)
    hidden_size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    begun = initial_weight("sign", len(LABELS), hidden_size, SEED)
    for when, (loss, accuracy) in {
        "before": _scores(Path(inputs["model"]), rows, begun),
        "after": _scores(folder, rows),
    }.items():
        assert sign[f"loss_{when}"] == pytest.approx(loss, rel=1e-5)
        assert summary[f"loss_{when}"] == sign[f"loss_{when}"]
        assert sign[f"accuracy_{when}"] == pytest.approx(accuracy)
    assert sign["loss_after"] != sign["loss_before"]


def test_what_is_handed_over_says_what_made_it(outputs: Any) -> None:
    """The checkpoint its model, data, job and proof; the model its checkpoint; the report both in one page without links."""
    checkpoint = verify(outputs.checkpoint.open(), "checkpoint")
    assert checkpoint.lineage.keys() >= {"model", "data", "job", "logit_report"}
    assert checkpoint.counts["steps"] == STEPS
    assert read_manifest(outputs.model.open()).lineage["checkpoint"] == checkpoint.digest
    page = (outputs.report.open() / "report.html").read_text(encoding="utf-8")
    assert all(part in page for part in ("Loss of sign", 'class="trained"', checkpoint.digest))
    assert "http://" not in page and "<script" not in page


def test_only_what_an_input_touches_runs_again(outputs: Any, inputs: dict[str, Any], ledger: Path) -> None:
    """Nothing for the same inputs; scores and page for more held-out rows; all from the training on for another way to train,
    which is refused there: adapters of experts, which a llama doesn't have."""
    take_events(ledger)
    assert heads(**inputs).report.uri == outputs.report.uri
    assert {event for event, _ in take_events(ledger)} == {"cached"}
    more = heads(**{**inputs, "evaluation": HeadsEvalConfig(max_rows=12)})
    events = take_events(ledger)
    scored = ["score_heads_on_ray", "score_heads"]
    assert [task for event, task in events if event == "executed"] == [*scored, *scored, "summarize_heads"]
    assert ("cached", "train_heads") in events and more.checkpoint.uri == outputs.checkpoint.uri
    model = ModelConfig.parse({"compute_dtype": "float32", "lora": {"targets": ["experts"]}}, where="test")
    with pytest.raises(ConfigError, match="has no 'experts'"):
        heads(**{**inputs, "config": CONFIG.model_copy(update={"model": model})})
    assert take_events(ledger) == [
        ("executed", "check_heads_job"),
        *[("cached", task) for task in (*INGESTED, *INGESTED, "prepare_model", "verify_model", "score_heads")],
    ]


def test_the_training_of_a_checkpoint_goes_on(outputs: Any, inputs: dict[str, Any]) -> None:
    """Two more steps: a run of its own, which has the figures of the first and names the checkpoint that it began with."""
    begun = outputs.checkpoint.open()
    onward = heads(**{**inputs, "steps": STEPS + 2, "resume_from": outputs.checkpoint}).checkpoint.open()
    before, after = ((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for folder in (begun, onward))
    assert after[:STEPS] == before and len(after) == STEPS + 2
    assert verify(onward, "checkpoint").lineage["resume_from"] == read_manifest(begun).digest


def test_a_label_that_no_head_has_stops_the_run_at_the_door(
    outputs: Any, inputs: dict[str, Any], ledger: Path, tmp_path: Path
) -> None:
    """By its line, before the model is looked at."""
    rows = _rows(range(20, 24))
    rows[2]["labels"] = {"sign": "zero"}
    ledger.unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"eval\.jsonl:3: labels: sign is 'zero'; expected one of negative, positive"):
        heads(**{**inputs, "eval_data": _write(tmp_path / "eval.jsonl", rows)})
    assert [task for event, task in take_events(ledger) if event == "executed"] == []

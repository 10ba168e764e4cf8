"""Laws of training named outputs as a whole: labels go where their documents go, every head has its own denominator."""

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from lib.cluster.group import RankInfo
from lib.cluster.local import LocalGroup
from lib.config.evaluation import HeadsEvalConfig
from lib.config.recipes import HeadsJob
from lib.config.rows import RowsConfig
from lib.core.artifact import read_manifest, stage_artifact
from lib.core.errors import ConfigError, DataError, ModelError
from lib.core.manifest import Manifest
from lib.data.document import Document
from lib.data.feed import ChatFeed
from lib.data.rows import ingest_dataset
from lib.data.tokenize import tokenize_conversations
from lib.evals.heads import HeadsReport, write_heads_report
from lib.evals.heads_page import evaluation_metrics, write_heads_page
from lib.models.admit import admit_model
from lib.models.head_io import read_heads
from lib.models.verify import build_logit_report
from lib.recipes.evaluate_heads import HeadsEvalWorker, run_heads_evaluation
from lib.recipes.heads import run_heads
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from lib.train.compact_ids import expand_ids
from lib.train.run import RunInputs
from tests.lib.models.test_hf_fallback import fallback_model
from tests.lib.recipes.conftest import IN_PROCESS, Inputs, Shown, job, metrics

HEADS: list[dict[str, Any]] = [
    {"name": "text", "kind": "lm", "weight": 0.5},
    {"name": "reward", "kind": "scalar"},
    {"name": "clicked", "kind": "scalar", "loss": "logistic"},
    {"name": "topic", "kind": "classification", "labels": ["small", "large", "none"]},
    {"name": "worth", "kind": "scalar", "per": "token", "weight": 0.3},
]
REWARD, TOPIC = HEADS[1], HEADS[3]


def labels_of(number: int, num_tokens: int) -> dict[str, Any]:
    """Rewards on two rows of three; a worth for the answer, or in every fourth row for every second token."""
    by_token = [token % 5 / 5 if token % 2 else None for token in range(num_tokens)]
    found = {
        "clicked": number % 2,
        "topic": "small" if number < 20 else "large",
        "worth": by_token if number % 4 == 0 else number / 40,
    }
    return found | ({"reward": number / 40} if number % 3 else {})


@dataclass(frozen=True)
class Labelled:
    """Rows with labels, as values, as a data set and as JSON lines."""

    rows: list[dict[str, Any]]
    data: Path
    file: Path


@pytest.fixture(scope="session")
def labelled(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    root = tmp_path_factory.mktemp("labelled")
    rows = [json.loads(line) for line in (inputs.data.parent / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    documents = documents_of(inputs.model, inputs.data)
    rows = [{**row, "labels": labels_of(number, len(documents[number].token_ids))} for number, row in enumerate(rows)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    heads = heads_job().config.heads
    with stage_artifact(root / "data", "dataset") as staged:
        ingest_dataset(root / "rows.jsonl", staged, config=RowsConfig(heads=heads))
    return Labelled(rows, root / "data", root / "rows.jsonl")


def documents_of(model: Path, data: Path) -> list[Document]:
    """The rows of a data set in their order."""
    encoder = ChatEncoder(Tokenizer.load(model))
    return ChatFeed(heads_job().config.data, str(data), str(model), 384, 4).first_documents(encoder, 40)


def heads_job(*, heads: list[dict[str, Any]] = HEADS, **changes: Any) -> HeadsJob:
    values = job(**{"steps": 4, **changes}).model_dump(mode="json")
    values["config"]["heads"] = heads
    return HeadsJob.parse(values, where="test")


def train(
    inputs: Inputs, data: Path, settings: HeadsJob, root: Path, *, run: str = "run", name: str = "checkpoint"
) -> Manifest:
    factory = IN_PROCESS if settings.shape.num_ranks == 1 else LocalGroup
    given = RunInputs(inputs.model, data, inputs.report, root / run, inputs.resume_from)
    with stage_artifact(root / name, "checkpoint") as staged:
        run_heads(settings, given, staged, group_factory=factory, progress=Shown())
    return read_manifest(root / name)


def score(model: Path, data: Path, settings: HeadsJob, *, max_rows: int = 40) -> HeadsReport:
    config = HeadsEvalConfig(max_rows=max_rows)
    return run_heads_evaluation(model, data, settings.scoring, config, group_factory=IN_PROCESS, progress=Shown())


@pytest.fixture(scope="session")
def trained(inputs: Inputs, labelled: Labelled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    train(inputs, labelled.data, heads_job(), root)
    return root


def test_every_head_is_trained_and_reported(trained: Path, inputs: Inputs) -> None:
    """The loss is the weighted sum of the means that stand beside it; every head moved from where its name and seed put it,
    and the folder is a model that comes in again through the gate."""
    rows = metrics(trained / "checkpoint")
    for row in rows:
        parts = [head.get("weight", 1.0) * row[f"loss/{head['name']}"] for head in HEADS]
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-6)
        assert row["targets/text"] == row["num_targets"] > row["targets/topic"] == len(expand_ids(row["samples"]))
        assert 0 < row["targets/reward"] < row["targets/topic"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert 0 <= rows[0]["accuracy/text"] <= 1 and "accuracy/reward" not in rows[0]
    saved = read_heads(trained / "checkpoint" / "hf")
    assert saved is not None and saved.config.heads == heads_job().config.heads
    with stage_artifact(trained / "again", "model") as staged:
        admit_model(trained / "checkpoint" / "hf", staged)
    before, after = (load_file(folder / "model.safetensors") for folder in (inputs.model, trained / "again"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert read_manifest(trained / "checkpoint").meta["heads"] == [head["name"] for head in HEADS]


def test_the_same_run_twice_and_a_resumed_one_are_the_same_bits(
    trained: Path, inputs: Inputs, labelled: Labelled, tmp_path: Path
) -> None:
    """From the checkpoint of step 2, heads and their moments included."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    digest = read_manifest(trained / "checkpoint").digest
    assert train(inputs, labelled.data, heads_job(), tmp_path).digest == digest
    assert train(inputs, labelled.data, heads_job(), tmp_path, run="another", name="fresh").digest == digest


def test_ranks_and_micro_batches_change_nothing(trained: Path, inputs: Inputs, labelled: Labelled, tmp_path: Path) -> None:
    """[C1] [C2] Two ranks, and micro-batches of two rows: every figure of every step to 1e-5, though rewards are spread
    unevenly over the rows."""
    changed = {"ranks": heads_job(ranks=2), "micro": heads_job(train={"rows_per_micro_batch": 2})}
    expected = metrics(trained / "checkpoint")
    for name, settings in changed.items():
        train(inputs, labelled.data, settings, tmp_path, run=f"run-{name}", name=name)
        for found, row in zip(metrics(tmp_path / name), expected, strict=True):
            assert found.pop("samples") == row["samples"]
            assert found == pytest.approx({key: row[key] for key in found}, rel=1e-5, abs=1e-5)


def test_labels_go_with_their_documents_whoever_reads_them(
    trained: Path, inputs: Inputs, labelled: Labelled, tmp_path: Path
) -> None:
    """Tokenised before, or in a process of its own: the very figures of every step."""
    expected = metrics(trained / "checkpoint")
    with stage_artifact(tmp_path / "tokens", "tokenized_dataset") as staged:
        tokenize_conversations(labelled.data, inputs.model, heads_job().config.data.chat, staged, lambda count: None)
    train(inputs, tmp_path / "tokens", heads_job(), tmp_path, name="tokenised")
    assert metrics(tmp_path / "tokenised") == expected
    apart = heads_job(data={"workers": 1, "worker_kind": "process"})
    train(inputs, labelled.data, apart, tmp_path, run="run-apart", name="apart")
    assert metrics(tmp_path / "apart") == expected


def test_scores_are_the_training_s_own_figures(trained: Path, inputs: Inputs, labelled: Labelled, tmp_path: Path) -> None:
    """A step over all rows, from the heads that a seed begins with, reports what an evaluation of the untrained model does; so
    do the shares of two ranks together. Two small steps make it better."""
    data = {"num_streams": 1, "packing": "pad"}
    settings = heads_job(steps=2, sequence_length=192, optim={"warmup_steps": 1}, train={"rows_per_step": 40}, data=data)
    settings = settings.model_copy(update={"learning_rate": 1e-4})
    train(inputs, labelled.data, settings, tmp_path)
    (first, *_), before = metrics(tmp_path / "checkpoint"), score(inputs.model, labelled.data, settings)
    assert (before.num_rows, before.num_tokens) == (40, first["num_tokens"])
    assert before.loss == pytest.approx(first["loss"], rel=1e-5)
    for head in before.heads:
        assert head.loss == pytest.approx(first[f"loss/{head.name}"], rel=1e-5)
        assert head.num_targets == first[f"targets/{head.name}"]
        assert head.accuracy == pytest.approx(first.get(f"accuracy/{head.name}"))
    shares: Counter[str] = Counter()
    for rank in range(2):
        worker = HeadsEvalWorker(RankInfo(rank, 2, rank, 0, "cpu"))
        shares.update(worker.measure(settings.scoring.model_dump(mode="json"), 40, inputs.model, labelled.data))
        assert sum(event["finished"] for event in worker.drain_events()) == 20
    for head in before.heads:
        assert shares[f"divisor/{head.name}"] == head.num_targets
        assert shares[f"sum/{head.name}"] == pytest.approx(head.loss * head.num_targets, rel=1e-5)
    assert score(tmp_path / "checkpoint" / "hf", labelled.data, settings).loss < before.loss


def test_rows_that_are_not_finite_are_counted_apart(inputs: Inputs, labelled: Labelled, tmp_path: Path) -> None:
    """[C10] A model whose vector of the token "9" is NaN: its scores are those of the rows without that digit, though rows
    share packs, and the others are counted."""
    settings = heads_job(heads=HEADS[1:])
    token = Tokenizer.load(inputs.model).encode("9")[0]
    shutil.copytree(inputs.model, tmp_path / "poisoned")
    weights = load_file(inputs.model / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, tmp_path / "poisoned" / "model.safetensors", metadata={"format": "pt"})
    clean = [row for row in labelled.rows if "9" not in json.dumps(row["messages"])]
    (tmp_path / "clean.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clean), encoding="utf-8")
    with stage_artifact(tmp_path / "clean", "dataset") as staged:
        ingest_dataset(tmp_path / "clean.jsonl", staged, config=RowsConfig(heads=settings.config.heads))
    found, expected = score(tmp_path / "poisoned", labelled.data, settings), score(inputs.model, tmp_path / "clean", settings)
    assert 0 < expected.num_rows < 40
    assert (found.num_rows, found.num_not_finite, found.num_tokens) == (expected.num_rows, 40 - len(clean), expected.num_tokens)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    for mine, theirs in zip(found.heads, expected.heads):
        assert (mine.num_targets, mine.accuracy) == (theirs.num_targets, theirs.accuracy)


def test_the_report_compares_every_head(trained: Path, inputs: Inputs, labelled: Labelled, tmp_path: Path) -> None:
    """Numbers for programs, a page without links for people; scores of other rows are refused."""
    folders = {"before": (inputs.model, 40), "after": (trained / "checkpoint" / "hf", 40), "fewer": (inputs.model, 8)}
    reports = {name: score(model, labelled.data, heads_job(), max_rows=rows) for name, (model, rows) in folders.items()}
    for name, report in reports.items():
        with stage_artifact(tmp_path / name, "heads_report") as staged:
            write_heads_report(report, staged)
    with stage_artifact(tmp_path / "report", "report") as staged:
        given = {"checkpoint": trained / "checkpoint", "after": tmp_path / "after"}
        summary = write_heads_page(staged, **given, before=tmp_path / "before")
        with pytest.raises(DataError, match="score the same ones"):
            write_heads_page(staged, **given, before=tmp_path / "fewer")
    assert json.loads((tmp_path / "report" / "summary.json").read_text(encoding="utf-8")) == summary
    assert summary["loss_before"] == reports["before"].loss and summary["loss_after"] == reports["after"].loss
    assert list(summary["heads"]) == [head["name"] for head in HEADS]
    assert summary["heads"]["reward"]["accuracy_after"] is None
    assert evaluation_metrics(summary)["eval.topic.loss_after"] == reports["after"].heads[3].loss
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    parts = ("Loss of worth", "clicked", 'class="trained"', "squared error by token, weight 0.3", "topic: small")
    assert all(part in page for part in parts) and "http://" not in page
    assert re.search(r"worth: [1-9]\d* of \d+ tokens", page)


@pytest.mark.parametrize("head", [REWARD, TOPIC], ids=["number", "label"])
@torch.no_grad()
def test_a_head_alone_becomes_transformers_classifier_of_the_same_score(
    inputs: Inputs, labelled: Labelled, tmp_path: Path, head: dict[str, Any]
) -> None:
    """Trained with adapters below it; the loss that our evaluation finds is that of transformers' outputs, row by row."""
    settings = heads_job(heads=[head], model={"lora": {"rank": 4}})
    rows = [
        {**row, "labels": {head["name"]: row["labels"][head["name"]]}} for row in labelled.rows if head["name"] in row["labels"]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:12]), encoding="utf-8")
    with stage_artifact(tmp_path / "data", "dataset") as staged:
        ingest_dataset(tmp_path / "rows.jsonl", staged)
    train(inputs, tmp_path / "data", settings, tmp_path)
    folder = tmp_path / "checkpoint" / "hf"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found = score(folder, tmp_path / "data", settings)
    losses = []
    for row, document in zip(rows, documents_of(folder, tmp_path / "data")):
        ids = torch.from_numpy(document.token_ids).long()[None]
        logits, label = model(ids, use_cache=False).logits[0], row["labels"][head["name"]]
        if head is REWARD:
            losses.append(float((logits[0] - label) ** 2))
        else:
            losses.append(-float(logits.log_softmax(-1)[head["labels"].index(label)]))
    assert found.heads[0].num_targets == len(losses) == 12
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    with stage_artifact(tmp_path / "classifier", "model") as staged:
        admit_model(folder, staged)
    digest = read_manifest(tmp_path / "classifier").digest
    report = build_logit_report(tmp_path / "classifier", num_configs=0).model_copy(update={"model_digest": digest})
    further = Inputs(tmp_path / "classifier", inputs.data, report)
    train(further, tmp_path / "data", heads_job(heads=[head], steps=8), tmp_path, run="again", name="further")
    assert score(tmp_path / "further/hf", tmp_path / "data", settings).loss < found.loss, "it is trained further"


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"rewrad": 1.0}, r"labels has 'rewrad', the heads with labels are reward, clicked, topic, worth"),
        ({"topic": "huge"}, r"topic is 'huge'; expected one of small, large, none"),
        ({"reward": "high"}, r"reward is 'high', expected a number"),
        ({"reward": [1.0]}, r"reward is a list"),
        ({"clicked": 2}, r"clicked is 2\.0; the logistic loss takes 0 to 1"),
        ({"reward": True}, r"labels: reward is of type bool"),
        ({"reward": 1e39}, r"32 bits"),
        ({"worth": [None]}, r"without a value"),
        ({"Worth!": 1}, r"can't be a head's name"),
        (["reward"], r"labels is of type list"),
    ],
)
def test_wrong_labels_are_refused_with_their_line(labelled: Labelled, tmp_path: Path, labels: Any, words: str) -> None:
    """At the door, before anything is trained."""
    rows = [*labelled.rows[:2], {**labelled.rows[2], "labels": labels}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = RowsConfig(heads=heads_job().config.heads)
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{words}"), stage_artifact(tmp_path / "data", "dataset") as staged:
        ingest_dataset(tmp_path / "rows.jsonl", staged, config=config)


def test_what_can_t_be_trained_is_refused(trained: Path, inputs: Inputs, labelled: Labelled, tmp_path: Path) -> None:
    """Rows without a label for any head, lists of another length than the row has tokens, rows that would be cut, a
    classifier's language model, heads that the run would lose, a model of no family."""
    bare, settings = inputs.data, heads_job(heads=[REWARD])
    with pytest.raises(DataError, match=r"row 'row-\d+' has no label for any of the heads reward"):
        train(inputs, bare, settings, tmp_path, run="bare")
    rows = [{**row, "labels": {"worth": [1.0]}} for row in labelled.rows[:4]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with stage_artifact(tmp_path / "data", "dataset") as staged:
        ingest_dataset(tmp_path / "rows.jsonl", staged)
    with pytest.raises(DataError, match=r"worth has 1 values, but this tokenizer and chat format make \d+ tokens"):
        train(inputs, tmp_path / "data", heads_job(), tmp_path, run="short")
    with pytest.raises(ConfigError, match="labels are of whole rows"):
        heads_job(data={"long_rows": "split"})
    headed = replace(inputs, model=trained / "headed")
    with stage_artifact(headed.model, "model") as staged:
        admit_model(trained / "checkpoint" / "hf", staged)
    with pytest.raises(ModelError, match=r"has a head 'clicked'"):
        train(headed, labelled.data, heads_job(heads=HEADS[:2]), tmp_path, run="lost")
    with stage_artifact(tmp_path / "gpt2", "model") as staged:
        admit_model(fallback_model(tmp_path / "source", "gpt2"), staged)
    with pytest.raises(ConfigError, match="no family here"):
        train(replace(inputs, model=tmp_path / "gpt2"), labelled.data, heads_job(), tmp_path, run="fallback")

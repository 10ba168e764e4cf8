"""What the inspection shows is what training is fed, and wrong input is one message."""

import html
import json
from pathlib import Path
from typing import Any

import pytest

from lib.config.data import DataConfig
from lib.config.rows import RowsConfig
from lib.core.artifact import stage_artifact
from lib.core.examples import IGNORE_INDEX
from lib.data.rows import ingest_dataset
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from tasks.inspect import main
from tests.tiny import tiny_tokenizer

HOSTILE = "\x1b]0;owned\x07 \x1b[2J \u202e <script>alert(1)</script> \x9b31m"
"""Sets the terminal's title, clears it, turns the writing direction round; a script; an 8-bit control sequence."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and nothing else."""
    return tiny_tokenizer(tmp_path_factory.mktemp("inspect") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of several lengths; every fourth has two turns, the first of weight 0.5."""
    path = tmp_path_factory.mktemp("inspect") / "rows.jsonl"
    rows = []
    for number in range(24):
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": f"What is {number} and {number}?" + " Add them." * (number % 5)},
            {"role": "assistant", "content": f"The sum is {2 * number}."},
        ]
        if number % 4 == 0:
            turns[1]["weight"] = 0.5
            turns += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
        rows.append({"id": f"row-{number}", "messages": turns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _encoded(data: Path, model: Path, out: Path, *flags: str) -> list[dict[str, Any]]:
    assert main(["encode", "--data", str(data), "--model", str(model), "--out", str(out), *flags]) == 0
    return _lines(out)


def test_encode_gives_every_row_as_the_encoder_does(data: Path, model: Path, tmp_path: Path) -> None:
    """Ids, mask and weights are as long as each other; the spans are the mask's runs, and hold the answers and their ends."""
    rows = _encoded(data, model, tmp_path / "x.jsonl")
    assert [row["row_id"] for row in rows] == [f"row-{number}" for number in range(24)]
    for number, row in enumerate(rows):
        covered = [token for run in row["trained"] for token in range(run["start"], run["stop"])]
        assert covered == [token for token, trained in enumerate(row["loss_mask"]) if trained]
        assert [weight > 0 for weight in row["weights"]] == row["loss_mask"]
        assert len(row["token_ids"]) == len(row["loss_mask"])
        answers = [f"The sum is {2 * number}."] + ["Yes."] * (number % 4 == 0)
        assert [run["text"] for run in row["trained"]] == [f"{answer}<|im_end|>" for answer in answers]
        first = {row["weights"][token] for token in range(row["trained"][0]["start"], row["trained"][0]["stop"])}
        assert first == {0.5 if number % 4 == 0 else 1.0}


def test_encode_follows_train_on(data: Path, model: Path, tmp_path: Path) -> None:
    """Row 4's first turn has a weight of its own, which stays; of a row without weights only the last is trained."""
    encoder = ChatEncoder.of(Tokenizer.load(model), DataConfig(train_on="last_assistant_turn"))
    assert encoder.rules.train_on == "last_assistant_turn"
    rows = _encoded(data, model, tmp_path / "x.jsonl", "--train-on", "last_assistant_turn", "--rows", "5")
    assert len(rows) == 5
    assert [run["text"] for run in rows[1]["trained"]] == ["The sum is 2.<|im_end|>"]


def test_pack_keeps_every_law_of_a_packed_row(data: Path, model: Path, tmp_path: Path) -> None:
    """Each document's ids are those of `encode`; labels are the next trained token of the same document and nothing else."""
    encoded = {row["row_id"]: row for row in _encoded(data, model, tmp_path / "e.jsonl")}
    flags = ["--sequence-length", "192", "--seed", "7", "--num-streams", "4", "--rows", "10"]
    out = tmp_path / "p.jsonl"
    assert main(["pack", "--data", str(data), "--model", str(model), "--out", str(out), *flags]) == 0
    rows = _lines(out)
    assert [(row["row"], row["stream"]) for row in rows] == [(number, number % 4) for number in range(10)]
    for row in rows:
        for number, sample_id in enumerate(row["sample_ids"]):
            slots = [slot for slot, document in enumerate(row["document_ids"]) if document == number]
            origin = encoded[sample_id]
            assert [row["token_ids"][slot] for slot in slots] == origin["token_ids"]
            assert [row["positions"][slot] for slot in slots] == list(range(len(slots)))
            trained = [*zip(origin["token_ids"], origin["loss_mask"], origin["weights"]), (0, False, 0.0)][1:]
            assert [row["labels"][slot] for slot in slots] == [token if kept else IGNORE_INDEX for token, kept, _ in trained]
            assert [row["weights"][slot] for slot in slots] == [weight for _, _, weight in trained]
        padding = [slot for slot, document in enumerate(row["document_ids"]) if document == -1]
        assert all(row["labels"][slot] == IGNORE_INDEX for slot in padding)
        assert row["num_targets"] == sum(label != IGNORE_INDEX for label in row["labels"])


def test_nothing_that_a_row_holds_reaches_the_terminal_or_the_page_as_a_command(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Codes stand in place of control characters, in text and id alike; a page has no tag that is not ours."""
    data = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": f"{HOSTILE} done"}]
    data.write_text(json.dumps({"id": "<b>id</b>", "messages": turns}) + "\n", encoding="utf-8")
    assert main(["show", "--data", str(data), "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    assert all(character == "\n" or character.isprintable() for character in shown)
    assert "\\x1b]0;owned\\x07" in shown and "done<|im_end|>⟧" in shown
    page = tmp_path / "page.html"
    assert main(["show", "--data", str(data), "--model", str(model), "--html", str(page)]) == 0
    written = page.read_text(encoding="utf-8")
    assert "<script" not in written and "<b>" not in written
    assert html.escape("<script>alert(1)</script>") in written


OTHER_KINDS: dict[str, dict[str, Any]] = {
    "completion": {"id": "c", "prompt": "The sum of 1 and 2 is", "completion": " 3."},
    "preference": {"id": "p", "prompt": "1 and 2?", "chosen": "It is 3.", "rejected": "It is 4.", "margin": 0.5},
    "prompt": {"id": "q", "prompt": "1 and 2?", "verifier": "last_number", "answer": "3"},
    "events": {"member": "m", "id": "e", "events": [{"item": "film-3", "action": "play", "timestamp": 1700000000}]},
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("ingested", [False, True])
def test_every_kind_of_example_is_shown(
    kind: str, ingested: bool, model: Path, tmp_path: Path, fresh_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The completion and the end of text; the answers of a pair, one after the other; a prompt and what it is judged by; events
    as they are. An ingested data set says of itself which kind it holds."""
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(OTHER_KINDS[kind]) + "\n", encoding="utf-8")
    flags = ["--kind", kind]
    if ingested:
        with stage_artifact(tmp_path / "data", "dataset") as staged:
            ingest_dataset(data, staged, config=RowsConfig(kind=kind))
        data, flags = tmp_path / "data", []
    (row,) = _encoded(data, model, tmp_path / "x.jsonl", *flags)
    assert row["row_id"] == OTHER_KINDS[kind]["id"] and row["place"] == "rows.jsonl:1"
    parts = [row[name] for name in ("chosen", "rejected") if name in row] or [row]
    trained = [run["text"] for part in parts for run in part.get("trained", [])]
    assert (
        trained
        == {
            "completion": [" 3.<|im_end|>"],
            "preference": ["It is 3.<|im_end|>", "It is 4.<|im_end|>"],
            "prompt": [],
            "events": [],
        }[kind]
    )
    assert all(len(part["token_ids"]) == len(part["loss_mask"]) for part in parts if "token_ids" in part)
    assert row.get("margin") == OTHER_KINDS[kind].get("margin")
    assert ("verifier" in row, "events" in row) == (kind == "prompt", kind == "events")
    assert main(["show", "--data", str(data), "--model", str(model), *flags]) == 0
    shown = capsys.readouterr().out
    assert all(f"⟦{text}⟧" in shown for text in trained)
    assert ("2023-11-14 22:13:20+00:00 play film-3" in shown) == (kind == "events")
    assert main(["show", "--data", str(data), "--model", str(model), *flags, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('class="trained"') == len(trained) and ("film-3" in page) == (kind == "events")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "required"),
        (["encode", "--model", "{model}", "--out", "{out}"], "--data is missing"),
        (["encode", "--data", "{data}", "--out", "{out}"], "--model is missing"),
        (["encode", "--data", "{data}.none", "--model", "{model}", "--out", "{out}"], "no such file"),
        (["encode", "--data", "{data}", "--model", "{data}", "--out", "{out}"], "tokenizer"),
        (["encode", "--data", "{bad}", "--model", "{model}", "--out", "{out}"], "bad.jsonl:1"),
        (["encode", "--data", "{data}", "--model", "{model}", "--out", "{data}"], "lies in the data"),
        (["encode", "--data", "{data}", "--model", "{model}", "--out", "{folder}"], "a folder"),
        (["encode", "--data", "{data}", "--model", "{model}", "--out", "{folder}/no/x"], "No such file"),
        (["encode", "--data", "{data}", "--model", "{model}", "--out", "{out}", "--rows", "0"], "above 0"),
        (["encode", "--data", "{data}", "--model", "{model}", "--out", "{out}", "--train-on", "all"], "train_on"),
        (["pack", "--data", "{data}", "--model", "{model}", "--out", "{out}"], "--sequence-length is missing"),
        (["pack", "--data", "{data}", "--model", "{model}", "--out", "{out}", "--sequence-length", "16"], "tokens"),
        (["pack", "--data", "{data}", "--model", "{model}", "--out", "{out}", "--sequence-length", "4"], "sequence_length"),
        (["pack", "--data", "{data}", "--model", "{model}", "--out", "{out}", "--seed", "-1"], "config.data"),
        (["show", "--config", "{config}"], "expected a mapping"),
        (["show", "--config", "{data}"], "not readable as YAML"),
    ],
)
def test_wrong_input_is_one_message_and_leaves_no_file(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    """[A16] exit code 1, what is wrong, no traceback and no half-written file."""
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "only a question"}]}\n', encoding="utf-8")
    (tmp_path / "config.yaml").write_text("config: [1]\n", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    names = {name: str(tmp_path / name) for name in ("out", "folder")}
    names |= {
        "data": str(data),
        "model": str(model),
        "bad": str(tmp_path / "bad.jsonl"),
        "config": str(tmp_path / "config.yaml"),
    }
    before = data.read_bytes()
    try:
        code = main([flag.format(**names) for flag in flags])
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 1
    assert message in error and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "config.yaml", "folder"]
    assert data.read_bytes() == before


def test_flags_win_over_a_configuration_file(data: Path, model: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {model}\ntrain_data: {data}\nsequence_length: 128\n"
        "config: {data: {seed: 7, num_streams: 4}, train: {rows_per_step: 2}}\n",
        encoding="utf-8",
    )
    one, two, three = (tmp_path / name for name in ("1", "2", "3"))
    assert main(["pack", "--config", str(config), "--out", str(one)]) == 0
    plain = ["pack", "--data", str(data), "--model", str(model), "--sequence-length", "128", "--seed", "7"]
    assert main([*plain, "--num-streams", "4", "--rows-per-step", "2", "--out", str(two)]) == 0
    assert main(["pack", "--config", str(config), "--seed", "8", "--out", str(three)]) == 0
    assert one.read_bytes() == two.read_bytes() != three.read_bytes()
    assert [row["step"] for row in _lines(one)][:4] == [1, 1, 2, 2]

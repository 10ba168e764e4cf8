"""Laws of the generated data set: nothing twice, answers that follow from their lines, bytes that depend on numbers alone."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.core.errors import DataError
from lib.data import chain_sum
from lib.data.chain_sum import worked_answer, write_chain_sum

TERM = st.integers(10, 99)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chain_sum")
    write_chain_sum(out, num_train=3000, num_eval=256)
    return out


def test_no_question_and_no_id_occurs_twice_over_both_files(folder: Path) -> None:
    rows = read(folder / "train.jsonl") + read(folder / "eval.jsonl")
    assert len(rows) == 3256
    assert len({row["messages"][1]["content"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)


def test_the_last_number_of_every_worked_answer_is_the_answer(folder: Path) -> None:
    for row in read(folder / "train.jsonl"):
        assert row["messages"][2]["content"].split()[-1] == row["answer"]
        expression = row["messages"][1]["content"].removeprefix("State the final answer to the following arithmetic problem: ")
        # Digits, spaces, plus and minus only: safe to evaluate.
        assert set(expression) <= set("0123456789 +-=")
        assert eval(expression.removesuffix(" =")) == int(row["answer"])


def test_the_evaluation_set_and_the_bytes_do_not_depend_on_the_number_of_training_rows(folder: Path, tmp_path: Path) -> None:
    write_chain_sum(tmp_path, num_train=100, num_eval=256)
    assert (tmp_path / "eval.jsonl").read_bytes() == (folder / "eval.jsonl").read_bytes()
    assert (folder / "train.jsonl").read_bytes().startswith((tmp_path / "train.jsonl").read_bytes())


def test_progress_counts_every_row(tmp_path: Path) -> None:
    steps: list[int] = []
    write_chain_sum(tmp_path, num_train=7, num_eval=3, progress=steps.append)
    assert sum(steps) == 10


def test_more_questions_than_there_are_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One-digit terms: 10 x 10 pairs and two operators make 200 questions."""
    monkeypatch.setattr(chain_sum, "NUMBERS", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    with pytest.raises(DataError, match="only"):
        write_chain_sum(tmp_path, num_train=200, num_eval=10)


@pytest.mark.parametrize(
    ("expression", "lines"),
    [
        ("84 - 36", ["80 - 30 = 50", "4 - 6 = -2", "50 - 2 = 48"]),
        ("47 + 85", ["40 + 80 = 120", "7 + 5 = 12", "120 + 12 = 132"]),
        ("15 - 98", ["10 - 90 = -80", "5 - 8 = -3", "-80 - 3 = -83"]),
        ("30 - 10", ["30 - 10 = 20", "0 - 0 = 0", "20 + 0 = 20"]),
    ],
)
def test_a_sum_is_taken_apart_into_tens_and_units(expression: str, lines: list[str]) -> None:
    assert worked_answer(expression).splitlines() == lines


@given(left=TERM, right=TERM, operator=st.sampled_from("+-"))
def test_every_line_is_true_and_the_last_one_has_the_result(left: int, right: int, operator: str) -> None:
    lines = worked_answer(f"{left} {operator} {right}").splitlines()
    for line in lines:
        equation, result = line.split(" = ")
        assert eval(equation) == int(result)
    assert int(lines[-1].split()[-1]) == (left + right if operator == "+" else left - right)

"""Laws of the generated data set: nothing twice, answers that follow from their lines, bytes that depend on numbers alone."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    assert len({row["messages"][0]["content"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)


def test_the_last_number_of_every_worked_answer_is_the_answer(folder: Path) -> None:
    for row in read(folder / "train.jsonl"):
        assert row["messages"][1]["content"].split()[-1] == row["answer"]
        expression = row["messages"][0]["content"].removeprefix("State the final answer to the following arithmetic problem: ")
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


def test_a_chain_is_its_partial_sums() -> None:
    """42 - 25 = 17, then 17 - 73 = -56, then -56 + 11 = -45."""
    assert worked_answer("42 - 25 - 73 + 11") == "42 - 25 = 17\n17 - 73 = -56\n-56 + 11 = -45"


@given(first=TERM, rest=st.lists(st.tuples(st.sampled_from("+-"), TERM), min_size=1, max_size=6))
def test_every_line_is_true_and_goes_on_from_the_line_before(first: int, rest: list[tuple[str, int]]) -> None:
    expression = f"{first} " + " ".join(f"{operator} {term}" for operator, term in rest)
    before = str(first)
    for line, (operator, term) in zip(worked_answer(expression).splitlines(), rest, strict=True):
        left, result = line.split(" = ")
        assert left == f"{before} {operator} {term}"
        assert eval(left) == int(result)
        before = result

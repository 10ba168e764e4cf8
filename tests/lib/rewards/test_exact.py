"""Laws of the verifiers: honest answers earn 1, whatever is clever earns 0, and no text makes them raise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.rewards.base import Score
from lib.rewards.catalogue import REWARDS, expected_problem
from lib.rewards.exact import exact_match, last_number, parse_number

GOLD = "42"
PROMPT = "State the final answer to the following arithmetic problem: 12 - 12 + 42 ="

HONEST = [
    "42", " 42 ", "42.", "The answer is 42.", "The final answer is **42**.", r"\boxed{42}", "$42$", "= 42", "12 + 30 = 42",
    "65 + 42 = 107\n107 - 65 = 42", "-13 + 55 = 42. The answer is 42.", "The answer is 42.\n\nThe answer is 42.", "42.0",
    "042",
    "answer: 42", "(42)", "It is 42!", "12 - -30 = 42", "Adding 12 and 30 gives 42", "42\n", "x = 42.00",
    "12 plus 30 is 42 apples",
    "Step 1: 12 + 12 = 24\nStep 2: 24 + 18 = 42", r"so $x = 42$.", '"42"', "1,000 - 958 = 42",
]  # fmt: skip

DEGENERATE = [
    # nothing, or nothing that is a number
    "", " ", "\n\n\n", "\t", "...", "?", "answer", "The answer is", r"\boxed{}", "<|im_end|>", "forty-two", "NaN", "inf",
    "None", "null",
    # the answer over and over, with nothing said
    "42 42", "42 42 42 42", "42, 42, 42", "42\n42\n42", "42;42", "The answer is 42. " * 20, "42" * 50, "= 42\n" * 9,
    # more than one answer
    "41 or 42", "41, 42", "40 41 42", "either 41 or 42", "41 and 42", "41/42", "41|42", "1\n2\n3\n42",
    "The answer is 41. The answer is 42.",
    "The answer is 42 or 43", "The answer is 42. Or 43.", "between 41 to 42", "Answer: 7\nAnswer: 42",
    "The result is 40. The result is 42",
    # boxes
    r"\boxed{41}\boxed{42}", r"\boxed{41} \boxed{42}", r"\boxed{41, 42}", r"\boxed{42}\boxed{41}", r"\boxed{\text{41 or 42}}",
    # the question again, which ends on the answer by chance
    PROMPT, PROMPT[:-2], PROMPT + " 12 - 12 + 42", "12 - 12 + 42", "12 + 42", "84 - 42", "2 * 42", "42 =", "42 + 1", "42 -",
    # characters that only look like the answer
    "\uff14\uff12", "\u0664\u0662", "4\u200b2", "4 2", "\u2474\u2473", "4\u06f2", "\U0001d7d2\U0001d7d0", "\u2463\u2461",
    "x42", "42x", "answer-42", "4.2.42", "0x42", "42 *",
    # another number that holds the answer
    "-42", "\u221242", "\u201342", "\uff0d42", "142", "420", "42.5", "1,42", "4,2", "42,000", "42e1", "0.42",
    "9" * 5000 + "42", "3,42,42",
]  # fmt: skip


@pytest.mark.parametrize("text", HONEST)
def test_an_honest_answer_is_worth_one(text: str) -> None:
    assert last_number(text, GOLD).value == 1.0


@pytest.mark.parametrize("text", DEGENERATE, ids=range(len(DEGENERATE)))
@pytest.mark.parametrize("name", list(REWARDS))
def test_a_degenerate_text_earns_no_more_than_an_honest_wrong_one(name: str, text: str) -> None:
    """[H1] More than sixty ways to earn something for nothing, against each reward."""
    assert len(DEGENERATE) > 60
    assert REWARDS[name](text, GOLD).value <= REWARDS[name]("The answer is 41.", GOLD).value == 0.0


@pytest.mark.parametrize("expected", ["", " ", "no number", "1 2", "\uff14", "4e1", "--4", "NaN"])
def test_an_unreadable_expected_answer_pays_nothing_and_is_refused_at_the_door(expected: str) -> None:
    """[H1] No text matches it, not even itself."""
    for text in ("", "42", expected, f"The answer is {expected}"):
        assert last_number(text, expected).value == 0.0
    assert expected_problem("last_number", expected) is not None


def test_exact_is_exact() -> None:
    assert exact_match(" Paris\n", "Paris") == Score(1.0)
    for text in ("paris", "Paris.", "Pari\u0455", "", "Paris Paris"):
        assert exact_match(text, "Paris").value == 0.0
    assert exact_match("", "").value == 0.0
    assert expected_problem("exact", "Paris") is None
    assert expected_problem("exact", "  ") == "the answer is empty"


@pytest.mark.parametrize(
    ("text", "value"), [("42", 42), ("-7", -7), ("\u22127", -7), ("1,234.5", 1234.5), (" 3 ", 3), (".5", 0.5), ("007", 7)]
)
def test_numbers_are_read_as_written(text: str, value: float) -> None:
    parsed = parse_number(text)
    assert parsed is not None
    assert float(parsed) == value
    assert last_number(f"The answer is {text.strip()}", text).value == 1.0


@given(st.text(), st.text())
def test_no_text_makes_a_reward_raise(text: str, expected: str) -> None:
    for reward in REWARDS.values():
        assert reward(text, expected).value in (0.0, 1.0)


@given(st.text(alphabet="0123456789+-*/=., \n()ab\u2212\uff14{}\\", max_size=60))
def test_no_arithmetic_soup_makes_it_raise_and_scores_are_explained(text: str) -> None:
    score = last_number(text, GOLD)
    assert score.value in (0.0, 1.0)
    assert len(score.parts) == 1


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_a_worked_sum_is_worth_one_exactly_when_right(left: int, right: int) -> None:
    assert last_number(f"{left} + {right} = {left + right}", str(left + right)).value == 1.0
    assert last_number(f"{left} + {right} = {left + right + 1}", str(left + right)).value == 0.0


def test_a_very_long_text_is_read_from_its_end() -> None:
    assert last_number("7 + 7 = 14. " * 200_000 + "\nThe answer is 42", GOLD).value == 1.0

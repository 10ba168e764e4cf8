"""Laws of prompts and of scoring."""

from pathlib import Path

import pytest

from lib.core.errors import DataError, GenerationError
from lib.core.examples import Conversation, Message
from lib.evals.generation import answerable, encoded_rows, prompts_of, score_rows
from lib.rewards.catalogue import REWARDS
from lib.rollout.types import Generation, SamplingParams
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer

PARAMS = SamplingParams(max_new_tokens=8, stop_ids=(2,))


def _row(index: int, answer: str | None = "42") -> Conversation:
    messages = (Message("user", f"question {index}"), Message("assistant", "The answer is 42."))
    return Conversation(f"id-{index}", messages, f"rows.jsonl:{index}", answer)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ChatEncoder:
    return ChatEncoder(Tokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def _generation(encoder: ChatEncoder, text: str, **changes: object) -> Generation:
    token_ids = (*encoder.tokenizer.encode(text), 2)
    plain = Generation((1, 5), token_ids, (-0.5,) * len(token_ids), "stop", "digest", PARAMS).to_plain()
    return Generation.from_plain({**plain, **changes})


def test_rows_are_scored_in_order_by_their_own_answer(encoder: ChatEncoder) -> None:
    rows = [_row(0, "41"), _row(1, "42"), _row(2, "43")]
    texts = ["It is 41.", "It is 41.", "It is 43."]
    scored = score_rows(rows, [_generation(encoder, text) for text in texts], encoder.tokenizer, REWARDS["last_number"])
    assert [(row.id, row.correct, row.answer, row.expected) for row in scored] == [
        ("id-0", True, "It is 41.", "41"),
        ("id-1", False, "It is 41.", "42"),
        ("id-2", True, "It is 43.", "43"),
    ]
    assert scored[0].prompt == "question 0"
    assert scored[0].mean_logprob == -0.5


def test_what_an_engine_did_not_answer_is_not_scored(encoder: ChatEncoder) -> None:
    """[G15] A missing generation, or one of another model, is a failure and never a wrong answer."""
    one = _generation(encoder, "42")
    other = _generation(encoder, "42", policy_digest="other")
    for generations in ([], [one], [one, other], [one, one, one]):
        with pytest.raises(GenerationError):
            score_rows([_row(0), _row(1)], generations, encoder.tokenizer, REWARDS["exact"])


def test_unverifiable_rows_are_refused_with_their_places() -> None:
    rows = [_row(0), _row(1, None), _row(2, "forty-two"), _row(3, " ")]
    with pytest.raises(
        DataError, match=r"2 row.*\nrows.jsonl:2: .*'forty-two' is not a number.*\nrows.jsonl:3: the answer is empty"
    ):
        answerable(rows, "last_number")
    assert [row.sample_id for row in answerable(rows[:3], "exact")] == ["id-0", "id-2"]
    with pytest.raises(DataError, match="none of the 1 evaluation rows has an 'answer'"):
        answerable([_row(0, None)], "exact")


def test_a_prompt_is_the_conversation_up_to_the_answer(encoder: ChatEncoder) -> None:
    [prompt] = prompts_of([_row(7)], encoder, max_new_tokens=8, max_positions=512)
    [encoded] = encoded_rows([_row(7)], encoder, 512)
    assert encoded.token_ids[: len(prompt)] == prompt
    assert encoded.loss_mask.index(True) == len(prompt)


def test_rows_that_exceed_the_context_are_refused(encoder: ChatEncoder) -> None:
    with pytest.raises(
        DataError, match=r"rows.jsonl:7: row 'id-7' has a prompt of \d+ tokens before 8 new, the model takes 40"
    ):
        prompts_of([_row(7)], encoder, max_new_tokens=8, max_positions=40)
    with pytest.raises(DataError, match=r"rows.jsonl:7: row 'id-7' has \d+ tokens, the model takes 40"):
        encoded_rows([_row(7)], encoder, 40)


def test_generations_cross_processes_unchanged(encoder: ChatEncoder) -> None:
    generation = _generation(encoder, "The answer is 42.")
    assert Generation.from_plain(generation.to_plain()) == generation
    assert Path(generation.policy_digest).name == "digest"

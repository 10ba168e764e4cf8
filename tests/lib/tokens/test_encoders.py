"""Laws of completions, preference pairs and prompts."""

import random

import pytest

from lib.core.errors import DataError
from lib.core.examples import Completion, Message, PreferencePair, Prompt
from lib.tokens.chat import ChatEncoder
from lib.tokens.encoders import encode_completions, encode_pairs, encode_prompts
from lib.tokens.rules import ChatRules
from lib.tokens.tokenizer import Tokenizer
from tests.lib.tokens.conversations import random_text
from tests.lib.tokens.formats import Format, real_tokenizer
from tests.lib.tokens.llama3 import llama3_tokenizer


@pytest.fixture(scope="module")
def qwen3() -> Format:
    return Format("qwen3", real_tokenizer("qwen3"), ChatRules(), "<|im_start|>assistant\n", ("<|im_end|>",), thinks=True)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> ChatEncoder:
    folder = llama3_tokenizer(tmp_path_factory.mktemp("llama3"))
    return ChatEncoder(Tokenizer.load(folder), ChatRules(template_date="2024-07-26"))


def test_completion_has_the_prompt_ids_of_serving_and_trains_the_rest(llama3: ChatEncoder, qwen3: Format) -> None:
    """[A2][A5] The prompt alone as the tokenizer gives it, begin token included; then completion and end of text."""
    source = random.Random(0)
    rows = [Completion(str(n), random_text(source) if n else "", random_text(source), "f:1") for n in range(200)]
    for encoder, prefix in ((llama3, [llama3.tokenizer.bos_id]), (qwen3.encoder, [])):
        tokenizer = encoder.tokenizer
        assert list(tokenizer.prefix_ids) == prefix
        for row, encoded in zip(rows, encode_completions(encoder, rows)):
            prompt = [*prefix, *tokenizer.encode(row.prompt)]
            assert encoded.token_ids == [*prompt, *tokenizer.encode(row.completion), tokenizer.eos_id]
            assert encoded.loss_mask == [place >= len(prompt) for place in range(len(encoded.token_ids))]


@pytest.mark.parametrize("row", [Completion("a", "<|eot_id|>", "x", "f:7"), Completion("a", "x", "<|eot_id|>", "f:7")])
def test_completion_holds_no_control_token(llama3: ChatEncoder, row: Completion) -> None:
    """[A7]"""
    with pytest.raises(DataError, match=r"f:7: row 'a': message \d .* holds the control token '<\|eot_id\|>'"):
        encode_completions(llama3, [row])
    split = ChatEncoder(llama3.tokenizer, ChatRules(template_date="2024-07-26", control_tokens="split"))
    assert encode_completions(split, [row])[0].token_ids.count(llama3.tokenizer.control_tokens["<|eot_id|>"]) == 1  # the end
    with pytest.raises(DataError, match="empty completion"):
        encode_completions(llama3, [Completion("a", "x", "", "f:7")])


def test_both_sides_of_a_pair_render_exactly(qwen3: Format) -> None:
    """[A9] 1,000 random pairs whose answers begin alike: each side's ids are apply_chat_template's of prompt and answer; what
    is trained is the answer's turns, whole, and none of the prompt's."""
    source = random.Random(0)
    pairs = [_pair(source, number) for number in range(1000)]
    for pair, encoded in zip(pairs, encode_pairs(qwen3.encoder, pairs)):
        for answer, side in ((pair.chosen, encoded.chosen), (pair.rejected, encoded.rejected)):
            values = [{"role": message.role, "content": message.content} for message in (*pair.prompt, *answer)]
            assert side.token_ids == list(qwen3.auto.apply_chat_template(values, return_dict=False))
            trained = [token for token, kept in zip(side.token_ids, side.loss_mask) if kept]
            said = "<think>\n\n</think>\n\n" + answer[0].content.lstrip("\n") + "<|im_end|>"
            assert said.endswith(qwen3.encoder.tokenizer.decode(trained)) and len(said.encode()) < 6 + sum(
                len(qwen3.encoder.tokenizer.decode([token]).encode()) for token in trained
            )
        assert (encoded.sample_id, encoded.margin) == (pair.sample_id, pair.margin)


def test_prompt_ends_with_the_header_of_the_turn_to_write(qwen3: Format) -> None:
    """Ids are apply_chat_template's with a generation prompt; verifier and payload come along."""
    messages = (Message("system", "s"), Message("user", "q"))
    found = encode_prompts(qwen3.encoder, [Prompt("a", messages, "f:1", "exact", '{"answer": 1}')])[0]
    values = [{"role": message.role, "content": message.content} for message in messages]
    assert found.token_ids == list(qwen3.auto.apply_chat_template(values, add_generation_prompt=True, return_dict=False))
    assert (found.sample_id, found.verifier, found.payload) == ("a", "exact", '{"answer": 1}')


def _pair(source: random.Random, number: int) -> PreferencePair:
    prompt = [Message("user", random_text(source))]
    for _ in range(source.randint(0, 2)):
        prompt += [Message("assistant", random_text(source)), Message("user", random_text(source))]
    shared = random_text(source)
    chosen, rejected = (Message("assistant", shared + random_text(source)) for _ in range(2))
    return PreferencePair(str(number), tuple(prompt), (chosen,), (rejected,), "f:1", margin=0.5)

"""Laws of added tokens."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lib.core.errors import DataError, TokenizerError
from lib.core.examples import Conversation, Message
from lib.tokens.chat import ChatEncoder
from lib.tokens.extend import write_extended
from lib.tokens.rules import ChatRules
from lib.tokens.tokenizer import Tokenizer
from lib.tokens.vocab_plan import VocabPlan, plan_vocabulary
from tests.lib.tokens.llama3 import llama3_tokenizer
from tests.tiny import VOCAB_SIZE, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny"))


@pytest.mark.parametrize("number", [1, 2, 63, 64, 65, 130])
def test_planned_tokenizer_has_the_planned_ids_wherever_it_is_loaded(tokenizer: Tokenizer, tmp_path: Path, number: int) -> None:
    """[A6] One id for each added token, ours and AutoTokenizer's alike; text without them is encoded as before; the plan
    comes back from the folder, and a copy of the folder keeps it."""
    special, semantic = ["<|member|>"][: number // 64], [f"<item_{index}>" for index in range(number)]
    plan = plan_vocabulary(tokenizer.vocab_size, special=special, semantic=semantic)
    found = write_extended(tokenizer, plan, tmp_path / "planned")
    auto = AutoTokenizer.from_pretrained(tmp_path / "planned")
    text = "watched " + " then ".join(plan.tokens) + "."
    assert found.encode(text) == auto(text, add_special_tokens=False)["input_ids"]
    assert [found.encode(token) for token in plan.tokens] == [[token_id] for token_id in plan.ids.values()]
    assert found.decode(found.encode(text)) == text
    assert found.encode("plain <|im_end|> text 42") == tokenizer.encode("plain <|im_end|> text 42")
    assert VocabPlan.read(tmp_path / "planned") == plan
    found.save(tmp_path / "copy")
    assert VocabPlan.read(tmp_path / "copy") == plan
    assert Tokenizer.load(tmp_path / "copy").digest == found.digest != tokenizer.digest


def test_semantic_ids_stand_in_text_and_added_control_tokens_do_not(tmp_path: Path) -> None:
    """[A7] Rows may hold what was planned for rows; a planned control token in a row is refused like any other. The order of
    ids holds for a tokenizer whose control tokens come last too."""
    base = Tokenizer.load(llama3_tokenizer(tmp_path / "llama3"))
    plan = plan_vocabulary(base.vocab_size, special=["<|member|>"], semantic=["<item_1>", "<item_2>"])
    encoder = ChatEncoder(write_extended(base, plan, tmp_path / "planned"), ChatRules(template_date="2024-07-26"))
    row = Conversation("a", (Message("user", "after <item_1>?"), Message("assistant", "<item_2>")), "f:1")
    encoded = encoder.encode([row])[0]
    assert [token for token in encoded.token_ids if token >= base.vocab_size] == [plan.ids["<item_1>"], plan.ids["<item_2>"]]
    trained = [token for token, kept in zip(encoded.token_ids, encoded.loss_mask) if kept]
    assert trained == [plan.ids["<item_2>"], base.control_tokens["<|eot_id|>"]]
    with pytest.raises(DataError, match=r"<\|member\|>"):
        encoder.encode([Conversation("a", (Message("user", "<|member|>"), Message("assistant", "a")), "f:1")])


@pytest.mark.parametrize(
    ("special", "semantic", "reason"),
    [
        (["<a>", "<b>"], ["<a>"], "given twice"),
        ([""], [], "white space"),
        ([], ["<a> "], "white space"),
    ],
)
def test_plan_that_cannot_be_kept_is_refused(special: list[str], semantic: list[str], reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason):
        plan_vocabulary(100, special=special, semantic=semantic)


def test_tokens_can_be_added_again_and_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A second plan goes on where the first ended; the first one's semantic tokens may still stand in rows."""
    first = plan_vocabulary(tokenizer.vocab_size, special=["<|member|>"], semantic=["<item_1>"])
    once = write_extended(tokenizer, first, tmp_path / "once")
    second = plan_vocabulary(once.vocab_size, semantic=["<item_2>"], known=first.semantic)
    twice = write_extended(once, second, tmp_path / "twice")
    ids = [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2]
    assert twice.encode("<|member|><item_1><item_2>") == ids
    assert twice.control_tokens.keys() - tokenizer.control_tokens.keys() == {"<|member|>"}
    assert twice.encode_text("<item_1><item_2>") == ids[1:]


def test_roles_and_template_reach_every_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """[D7] An added token ends turns and another one pads: ours and AutoTokenizer say so, from the folder alone."""
    plan = plan_vocabulary(tokenizer.vocab_size, special=["<|done|>", "<|pad|>"])
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + message['content'] + '<|done|>' }}{% endfor %}"
    )
    roles = {"eos_token": "<|done|>", "pad_token": "<|pad|>"}
    found = write_extended(tokenizer, plan, tmp_path / "planned", roles=roles, chat_template=template)
    auto = AutoTokenizer.from_pretrained(tmp_path / "planned")
    assert (auto.eos_token_id, auto.pad_token_id) == (found.eos_id, found.pad_id) == (VOCAB_SIZE, VOCAB_SIZE + 1)
    assert found.stop_ids == (VOCAB_SIZE,)
    assert auto.get_chat_template() == found.template == template
    with pytest.raises(TokenizerError, match="pad_token '<none>' is no token"):
        write_extended(tokenizer, plan, tmp_path / "wrong", roles={"pad_token": "<none>"})


def test_plan_of_another_tokenizer_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A plan for fewer ids, a token that is there, a file that is no plan."""
    with pytest.raises(TokenizerError, match="the vocabulary plan is for 100"):
        write_extended(tokenizer, plan_vocabulary(100, semantic=["<x>"]), tmp_path / "a")
    with pytest.raises(TokenizerError, match="is there already"):
        write_extended(tokenizer, plan_vocabulary(tokenizer.vocab_size, semantic=["<|im_end|>"]), tmp_path / "b")
    for content in ("{", json.dumps({"version": 1}), json.dumps({"version": 2, "special": []})):
        (tmp_path / "vocab_plan.json").write_text(content)
        with pytest.raises(TokenizerError, match="not a vocabulary plan"):
            VocabPlan.read(tmp_path)

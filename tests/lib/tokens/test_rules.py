"""What is trained: laws of TrainOn, weights, thinking and tools."""

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from lib.config.data import DataConfig
from lib.core.errors import ConfigError, DataError, TokenizerError
from lib.core.examples import Conversation, Encoded, Message, ToolCall
from lib.tokens.chat import ChatEncoder
from lib.tokens.rules import ChatRules
from lib.tokens.tokenizer import Tokenizer
from tests.lib.tokens.conversations import random_conversation
from tests.lib.tokens.formats import TOOL, Format, real_tokenizer
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer


@pytest.fixture(scope="module")
def qwen3() -> Format:
    return Format(
        "qwen3", real_tokenizer("qwen3"), ChatRules(), "<|im_start|>assistant\n", ("<|im_end|>",), thinks=True, calls=True
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny"))


CONVERSATION = Conversation(
    "a",
    (
        *(Message("user", "one"), Message("assistant", "first")),
        *(Message("user", "two ### now"), Message("assistant", "second")),
        *(Message("user", "three"), Message("assistant", "third")),
    ),
    "rows.jsonl:7",
)


def _trained(encoder: ChatEncoder, encoded: Encoded) -> str:
    return encoder.tokenizer.decode([token for token, kept in zip(encoded.token_ids, encoded.loss_mask) if kept])


@pytest.mark.parametrize(
    ("rules", "trained"),
    [
        (ChatRules(), "first<|im_end|>second<|im_end|>third<|im_end|>"),
        (ChatRules("last_assistant_turn"), "third<|im_end|>"),
        (ChatRules("after_marker", "###"), "second<|im_end|>third<|im_end|>"),
        (ChatRules("after_marker", "first"), "second<|im_end|>third<|im_end|>"),
        (ChatRules("after_marker", "second"), "third<|im_end|>"),
    ],
)
def test_turns_trained_are_those_the_rule_names(tiny: Tokenizer, rules: ChatRules, trained: str) -> None:
    """[A1] A marker in an assistant's turn trains those after it; ids don't depend on the rule."""
    encoder = ChatEncoder(tiny, rules)
    encoded = encoder.encode([CONVERSATION])[0]
    assert _trained(encoder, encoded) == trained
    assert encoded.token_ids == ChatEncoder(tiny).encode([CONVERSATION])[0].token_ids
    assert encoded.weights is None


def test_row_in_which_the_rule_trains_nothing_is_refused(tiny: Tokenizer) -> None:
    """[A1] No marker, a marker in the last turn, or every turn with weight 0."""
    for marker in ("nowhere", "third"):
        with pytest.raises(DataError, match=r"rows\.jsonl:7: row 'a' has nothing to train on"):
            ChatEncoder(tiny, ChatRules("after_marker", marker)).encode([CONVERSATION])
    silent = tuple(replace(message, weight=0.0) for message in CONVERSATION.messages)
    with pytest.raises(DataError, match="nothing to train on"):
        ChatEncoder(tiny).encode([replace(CONVERSATION, messages=silent)])


def test_weight_of_a_message_goes_before_the_rule(tiny: Tokenizer) -> None:
    """Turns with weights .5, none and 0, only the last trained by rule: .5 on all tokens of the first and its end, the last
    has no weight of its own but 0, so it isn't trained. Weights of 0 and 1 alone need no list."""
    weights = (None, 0.5, None, None, 0.0, 0.0)
    messages = tuple(replace(message, weight=weight) for message, weight in zip(CONVERSATION.messages, weights))
    encoder = ChatEncoder(tiny, "last_assistant_turn")
    encoded = encoder.encode([replace(CONVERSATION, messages=messages)])[0]
    assert _trained(encoder, encoded) == "first<|im_end|>"
    assert encoded.weights == [0.5 if kept else 0.0 for kept in encoded.loss_mask]
    whole = tuple(replace(message, weight=1.0) if message.role == "assistant" else message for message in messages)
    assert encoder.encode([replace(CONVERSATION, messages=whole)])[0].weights is None


@pytest.mark.parametrize(
    ("number", "weight", "reason"),
    [(0, 1.0, r"message 1 \(user\)"), (1, -1.0, "-1.0"), (1, float("nan"), "nan"), (1, float("inf"), "inf")],
)
def test_weight_that_cannot_be_is_refused(tiny: Tokenizer, number: int, weight: float, reason: str) -> None:
    messages = list(CONVERSATION.messages)
    messages[number] = replace(messages[number], weight=weight)
    with pytest.raises(DataError, match=r"rows\.jsonl:7: row 'a'.*" + reason):
        ChatEncoder(tiny).encode([replace(CONVERSATION, messages=tuple(messages))])


def test_thinking_and_calls_are_trained_and_results_never(qwen3: Format) -> None:
    """A call with thinking, its result, an answer: trained are thinking, call and answer with their ends; without thinking
    neither the block nor its marks. Worked out by hand from Qwen3's template."""
    call = '\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    messages = (
        *(Message("user", "q"), Message("assistant", "Let me look.", thinking="hm", tool_calls=(ToolCall("f", '{"x":1}'),))),
        *(Message("tool", "result", name="f"), Message("assistant", "answer", thinking="so")),
    )
    row = Conversation("a", messages, "f:1", tools=(TOOL,))
    encoded = qwen3.encoder.encode([row])[0]
    first, last = f"<think>\nhm\n</think>\n\nLet me look.{call}<|im_end|>", "<think>\nso\n</think>\n\nanswer<|im_end|>"
    assert _trained(qwen3.encoder, encoded) == first + last
    answers = ChatEncoder(qwen3.encoder.tokenizer, ChatRules(train_thinking=False))
    quiet = answers.encode([row])[0]
    assert quiet.token_ids == encoded.token_ids
    assert _trained(answers, quiet) == f"Let me look.{call}<|im_end|>answer<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((Message("user", "q"), Message("assistant", "a", thinking="t")), "message 2 has thinking"),
        ((Message("user", "q"), Message("assistant", "a", tool_calls=(ToolCall("f", "{}"),))), "leaves out the call name"),
        ((Message("user", "q"), Message("assistant", "")), "nothing to train on|leaves out"),
    ],
)
def test_what_a_format_cannot_write_is_refused(tiny: Tokenizer, messages: tuple[Message, ...], reason: str) -> None:
    """ChatML has no thinking and no calls."""
    with pytest.raises(DataError, match=rf"f:3: row 'a'.*({reason})"):
        ChatEncoder(tiny).encode([Conversation("a", messages, "f:3")])


@pytest.mark.parametrize(
    ("call", "reason"), [(ToolCall("f", "{"), "not JSON"), (ToolCall("f", "[1]"), r"'\[1\]', no JSON object|not a JSON object")]
)
def test_arguments_that_are_no_object_are_refused(qwen3: Format, call: ToolCall, reason: str) -> None:
    row = Conversation("a", (Message("user", "q"), Message("assistant", "", tool_calls=(call,))), "f:3")
    with pytest.raises(DataError, match=rf"f:3: row 'a'.*{reason}"):
        qwen3.encoder.encode([row])


def test_configuration_asks_for_every_rule(tiny: Tokenizer) -> None:
    """[A18] Each field of the configuration is a field of the rules; contradictions are refused."""
    config = DataConfig(train_on="after_marker", train_marker="###", train_thinking=False, control_tokens="split")
    assert ChatEncoder.of(tiny, config).rules == ChatRules("after_marker", "###", False, "split")
    for values in ({"train_on": "after_marker"}, {"train_marker": "x"}, {"chat_table": "{}"}, {"chat_format": "table"}):
        with pytest.raises(ConfigError, match="goes with"):
            DataConfig.parse(values, where="test")
    with pytest.raises(ConfigError, match="template_date"):
        DataConfig.parse({"template_date": "2024-13-99"}, where="test")


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (ChatRules(chat_format="harmony"), "no token '<|start|>'"),
        (ChatRules(chat_format="table", chat_table="{"), "expected JSON"),
        (ChatRules(chat_format="table", chat_table='{"roles": {"user": ["a", "b"]}}'), "no role 'assistant'"),
        (ChatRules(chat_format="table", chat_table='{"roles": {"user": ["", ""], "assistant": ["A:", "."]}}'), "control token"),
        (ChatRules(chat_format="table", chat_table='{"roles": {"wizard": ["", ""]}}'), "wizard"),
    ],
)
def test_format_that_does_not_fit_the_tokenizer_is_refused(tiny: Tokenizer, rules: ChatRules, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ChatEncoder(tiny, rules)
    assert reason in str(caught.value)


def test_tokenizer_without_a_template_needs_a_format(tmp_path: Path) -> None:
    """It loads, since a table or harmony may be asked for."""
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path / "tiny", template=None))  # type: ignore[arg-type]
    assert tokenizer.stop_ids == (2,)
    with pytest.raises(ConfigError, match="has no chat template"):
        ChatEncoder(tokenizer)


def test_eight_threads_share_one_encoder(tiny: Tokenizer) -> None:
    """[A13] 8 threads x 2,000 mixed calls: no exception, and the results of one thread."""
    encoder = ChatEncoder(tiny)
    rows = [random_conversation(random.Random(number), number) for number in range(25)]
    expected = encoder.encode(rows), [encoder.render_prompt(row) for row in rows]
    shared = ChatEncoder(tiny)
    wrong: list[int] = []

    def work(thread: int) -> None:
        source = random.Random(thread)
        for _ in range(2000):
            number = source.randrange(len(rows))
            if source.random() < 0.5:
                wrong.extend([number] * (shared.encode([rows[number]]) != [expected[0][number]]))
            else:
                wrong.extend([number] * (shared.render_prompt(rows[number]) != expected[1][number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_template_that_treats_one_row_unlike_others_is_found_out(tmp_path: Path) -> None:
    """A rule on what a message says that reading the template doesn't show: a row is checked now and then, and fails."""
    odd = CHATML_TEMPLATE.replace("message['content'] +", "(message['content'] if message['content'] | length < 60 else 'x') +")
    encoder = ChatEncoder(Tokenizer.load(tiny_tokenizer(tmp_path / "tiny")))
    assert encoder.encode([CONVERSATION])
    with pytest.raises(TokenizerError, match="cuts or changes"):
        ChatEncoder(Tokenizer.load(tiny_tokenizer(tmp_path / "odd", template=odd)))

"""Random conversations, and a way to find the trained tokens that shares no code with the encoder."""

import random
from typing import Any

from lib.core.examples import Conversation, Message

_PIECES = (
    *("the answer", " is ", "42", "1234567890", "\n", "\n\n", "  ", "\t", " ", "x" * 30, "system\n", "assistant\n", "user"),
    *(
        "é",
        "日本",
        "😀👩🏽‍🚀",
        "<|",
        "im_start",
        "|>",
        "<b>&amp;</b>",
        "{{ x }}",
        "{% y %}",
        "'",
        '"',
        "\\n",
        "I'll",
        "½",
        "\x00",
    ),
)


def random_text(source: random.Random) -> str:
    """One to twelve pieces, not blank."""
    text = "".join(source.choice(_PIECES) for _ in range(source.randint(1, 12)))
    return text if text.strip() and "<|im_start|>" not in text else text.replace("<|", "<") + "."


def random_conversation(source: random.Random, number: int) -> Conversation:
    """[system] then one to four pairs of user and assistant."""
    messages = [Message("system", random_text(source))] if source.random() < 0.4 else []
    for _ in range(source.randint(1, 4)):
        messages += [Message("user", random_text(source)), Message("assistant", random_text(source))]
    return Conversation(f"row-{number}", tuple(messages), f"random.jsonl:{number + 1}")


def oracle(auto: Any, conversation: Conversation, end: str = "<|im_end|>") -> tuple[list[int], list[bool]]:
    """Ids and mask by rendering prefixes of the conversation with the unmarked template.

    The text of an assistant turn is what a rendering up to it has beyond the rendering before it with the generation
    prompt, up to and including the last end-of-turn token. A token is trained if it lies within such a text.
    """
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    text = auto.apply_chat_template(messages, tokenize=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(auto.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True))
            turn = auto.apply_chat_template(messages[: index + 1], tokenize=False)
            spans.append((start, turn.rindex(end) + len(end)))
    encoded = auto(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [any(start <= begin and stop <= last for start, last in spans) for begin, stop in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), mask

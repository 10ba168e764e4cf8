"""What of a conversation is trained, and how it is written."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from lib.config.chat import ChatConfig
from lib.core.errors import ConfigError, DataError
from lib.core.examples import Message

TrainOn = Literal["all_assistant_turns", "last_assistant_turn", "after_marker"]
RULES_FILE = "chat_rules.json"
"""In the folder of a trained model: the rules that it was trained with, by which it is asked as well."""


@dataclass(frozen=True)
class ChatRules:
    """The fields of the configuration that decide ids and masks; see lib.config.chat for what each means."""

    train_on: TrainOn = "all_assistant_turns"
    train_marker: str | None = None
    train_thinking: bool = True
    control_tokens: Literal["refuse", "split"] = "refuse"
    chat_format: Literal["template", "harmony", "table"] = "template"
    chat_table: str | None = None
    template_date: str | None = None

    @staticmethod
    def of(config: ChatConfig) -> "ChatRules":
        """The rules that a configuration asks for."""
        return ChatRules(
            train_on=config.train_on,
            train_marker=config.train_marker,
            train_thinking=config.train_thinking,
            control_tokens=config.control_tokens,
            chat_format=config.chat_format,
            chat_table=config.chat_table,
            template_date=config.template_date,
        )

    def save(self, folder: Path) -> None:
        """Write them into a model's folder."""
        (folder / RULES_FILE).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> "ChatRules | None":
        """Those that a model's folder says it was trained with; None where it doesn't say.

        Raises:
            ConfigError: the file isn't what `save` writes.
        """
        path = folder / RULES_FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON: {error}; copy the file again from where the model was trained") from error
        names = {field.name for field in fields(ChatRules)}
        if not isinstance(values, dict) or values.keys() != names:
            raise ConfigError(f"{path}: expected an object of {', '.join(sorted(names))}; copy the file again")
        return ChatRules.of(ChatConfig.parse(values, where=str(path)))

    def written_alike(self) -> "ChatRules":
        """Rules that write conversations the same way, and train all of an assistant's turns."""
        return ChatRules(
            control_tokens=self.control_tokens,
            chat_format=self.chat_format,
            chat_table=self.chat_table,
            template_date=self.template_date,
        )


def turn_weights(messages: Sequence[Message], rules: ChatRules, where: str) -> list[float]:
    """[messages] factor on the loss of each message; 0 for what is not trained, and always for others than the assistant.

    Raises:
        DataError: a weight is not a finite number of 0 or more, or is given to a message that can't be trained.
    """
    weights = [0.0] * len(messages)
    last = max((number for number, message in enumerate(messages) if message.role == "assistant"), default=-1)
    marker = -1
    if rules.train_on == "after_marker" and rules.train_marker is not None:
        holders = (number for number, message in enumerate(messages) if rules.train_marker in message.content)
        marker = next(holders, len(messages))
    for number, message in enumerate(messages):
        if message.weight is not None:
            _check_weight(message, number, where)
            weights[number] = message.weight
        elif message.role == "assistant":
            chosen = number == last if rules.train_on == "last_assistant_turn" else number > marker
            weights[number] = 1.0 if chosen else 0.0
    return weights


def _check_weight(message: Message, number: int, where: str) -> None:
    weight = message.weight
    if weight is None or not (math.isfinite(weight) and weight >= 0.0):
        raise DataError(f"{where}: message {number + 1} has the weight {weight!r}; give a finite number of 0 or more")
    if weight and message.role != "assistant":
        raise DataError(
            f"{where}: message {number + 1} ({message.role}) has the weight {weight!r}, but only an assistant's turns are "
            "trained; leave its weight out"
        )

"""How conversations become token ids and masks."""

from datetime import date
from typing import Literal

from pydantic import Field, model_validator

from lib.config.base import Frozen


class ChatConfig(Frozen):
    """Which words are trained, and how they are written."""

    train_on: Literal["all_assistant_turns", "last_assistant_turn", "after_marker"] = "all_assistant_turns"
    """Which assistant turns are trained: all, the last, or those after the first message that holds `train_marker`. A message
    with a weight of its own is trained by that. Results of tools and the words of others are never trained."""
    train_marker: str | None = Field(default=None, min_length=1, max_length=1024)
    """Text that the marking message holds, for train_on "after_marker" alone."""
    train_thinking: bool = True
    """Whether an assistant's thinking is trained; its answer and its calls of tools are."""
    control_tokens: Literal["refuse", "split"] = "refuse"
    """Rows whose text spells a control token of the tokenizer: an error naming them, or encoded as plain text."""
    chat_format: Literal["template", "harmony", "table"] = "template"
    """How a conversation becomes text: the tokenizer's own chat template, gpt-oss's harmony, or `chat_table`."""
    chat_table: str | None = Field(default=None, max_length=1 << 16)
    """JSON for chat_format "table": {"start": text, "roles": {role: [before, after]}}, what is written around each message."""
    template_date: str | None = Field(default=None, pattern=r"^\d{4}-\d{2}-\d{2}$")
    """Today (YYYY-MM-DD) for chat formats that write the date; they need it, since the same data must stay the same text."""

    @model_validator(mode="after")
    def _encoding_is_told_once(self) -> "ChatConfig":
        if (self.train_marker is not None) != (self.train_on == "after_marker"):
            raise ValueError(f"train_marker goes with train_on 'after_marker' and only with it; train_on is {self.train_on!r}")
        if (self.chat_table is not None) != (self.chat_format == "table"):
            raise ValueError(f"chat_table goes with chat_format 'table' and only with it; chat_format is {self.chat_format!r}")
        if self.template_date is not None:
            try:
                date.fromisoformat(self.template_date)
            except ValueError as error:
                raise ValueError(f"template_date {self.template_date!r} is no day ({error})") from error
        return self

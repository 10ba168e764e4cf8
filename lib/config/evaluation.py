"""How a model is scored."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lib.config.base import Frozen, Number
from lib.config.chat import ChatConfig
from lib.config.heads import HeadConfig, HeadsConfig
from lib.config.parallel import ClusterShape


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class HeadsEvalConfig(Frozen):
    """Scoring of output heads, as far as a training of them doesn't say it."""

    max_rows: int = Field(default=4096, ge=1)
    """Rows of the evaluation set that are used, from its start."""


class HeadsEvalJob(Frozen):
    """Output heads as a training of them has it."""

    heads: Annotated[tuple[HeadConfig, ...], BeforeValidator(_as_tuple)] = Field(min_length=1, max_length=256)
    chat: ChatConfig
    """As the model was trained."""
    seed: int = Field(ge=0)
    """Of heads that the model lacks."""
    shape: ClusterShape
    """Ranks that share the rows."""

    @property
    def outputs(self) -> HeadsConfig:
        return HeadsConfig(heads=self.heads)


class EvalConfig(Frozen):
    """Greedy generation with a verifier, and held-out loss."""

    verifier: Literal["last_number", "exact"] = "last_number"
    """Name of the reward in lib/rewards/catalogue.py that compares an answer with the row's `answer`."""
    chat_format: Literal["template", "harmony", "table"] | None = None
    """How a conversation becomes text; see DataConfig. None: as the model was trained, or where its folder doesn't say so,
    by the tokenizer's chat template. A model that was trained in another format is refused."""
    chat_table: str | None = Field(default=None, max_length=1 << 16)
    """For chat_format "table"."""
    template_date: str | None = Field(default=None, pattern=r"^\d{4}-\d{2}-\d{2}$")
    """Today (YYYY-MM-DD), for chat formats that write the date; with a chat_format alone."""
    max_new_tokens: int = Field(default=64, ge=1)
    max_rows: int = Field(default=512, ge=1)
    """Rows of the evaluation set that are used, from its start."""
    confidence: Number = Field(default=0.95, gt=0.0, lt=1.0)
    """Level of the intervals."""
    num_samples_shown: int = Field(default=8, ge=0, le=100)
    """Sample answers shown in the deck."""
    engines: int = Field(default=1, ge=1)
    """vLLM engines (Ray actors) that share the prompts."""
    engine_threads: int = Field(default=2, ge=1)
    """Compute threads of an engine on CPU."""
    kv_cache_gib: Number = Field(default=1.0, gt=0.0)
    """Memory of an engine's key-value cache on CPU."""
    interruptible: bool = False
    """Whether the engines' nodes may be spot machines; an evaluation that loses them begins again."""
    deadline_seconds: Number = Field(default=1800.0, gt=0.0)

    @model_validator(mode="after")
    def _format_is_whole(self) -> "EvalConfig":
        if self.chat_format is None and (self.chat_table is not None or self.template_date is not None):
            raise ValueError("chat_table and template_date go with a chat_format; set it too, or leave them out")
        return self

"""What is looked for in a data set before it is trained on."""

from typing import Literal

from pydantic import Field

from lib.config.base import Frozen, Number
from lib.config.data import DataConfig


class CleanConfig(Frozen):
    """Which rows are left out."""

    exact_duplicates: Literal["keep", "drop"] = "drop"
    """Rows of the same content, whatever their ids: all but the first."""
    near_duplicates: Literal["keep", "drop"] = "drop"
    """Rows nearly like an earlier one that is kept."""
    similarity: Number = Field(default=0.8, ge=0.3, le=1.0)
    """Of two rows: the word sequences that both hold over those that either holds; from this on they are near duplicates."""
    sequence_words: int = Field(default=5, ge=1, le=64)
    """Words in a sequence that is compared. System messages and tools are left out."""


class ContaminationConfig(Frozen):
    """When a row is taken to hold an evaluation row."""

    ngram_words: int = Field(default=13, ge=3, le=64)
    """Words in a sequence that is compared; an evaluation question of fewer words must be a whole message."""
    share: Number = Field(default=0.7, gt=0.0, le=1.0)
    """Of the sequences of one evaluation question, or of its answer: a row that holds so many of them is dropped."""


class SplitConfig(Frozen):
    """How rows are dealt to training and evaluation: by a hash, never by their order."""

    evaluation_fraction: Number = Field(default=0.02, gt=0.0, lt=1.0)
    """Expected share of the groups that are held out."""
    group: Literal["prompt", "content"] = "prompt"
    """Rows that stay together: those of one prompt (of one member, where rows are events), or of equal content alone."""
    salt: str = Field(default="", max_length=128)
    """Another text gives another split."""


class PreviewConfig(Frozen):
    """What a page about a data set shows of its training."""

    sequence_length: int = Field(default=1024, ge=8)
    """Tokens in a packed row."""
    packed_rows: int = Field(default=256, ge=1, le=1 << 16)
    """Packed rows that are made and measured."""
    examples: int = Field(default=4, ge=0, le=32)
    """Rows shown token by token in each chat format."""
    data: DataConfig = Field(default_factory=DataConfig)
    """How rows are to become batches; its mixture is left out."""

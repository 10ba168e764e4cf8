"""How rows become packed batches."""

from typing import Literal

from pydantic import Field

from lib.config.base import Frozen


class DataConfig(Frozen):
    """Streaming, masking and packing."""

    seed: int = Field(default=0, ge=0)
    """Orders the samples; the order is a function of data, seed and `num_streams` alone."""
    num_streams: int = Field(default=64, ge=1, le=4096)
    """Virtual streams the corpus is split into, independent of the number of ranks; a multiple of the ranks."""
    open_packs: int = Field(default=16, ge=1, le=1024)
    """Packs a stream keeps open while it looks for the best fit."""
    long_rows: Literal["refuse", "drop", "truncate"] = "refuse"
    """Rows longer than the sequence: an error naming them, dropped and counted, or cut at the end and counted."""
    train_on: Literal["all_assistant_turns", "last_assistant_turn"] = "all_assistant_turns"
    """Which assistant turns are trained."""
    prefetch_batches: int = Field(default=4, ge=1, le=64)
    """Batches the background worker prepares ahead."""

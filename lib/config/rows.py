"""What the rows of a source are to be."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lib.config.base import Frozen
from lib.config.heads import HeadConfig


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Kind = Literal["", "conversation", "completion", "preference", "prompt", "events"]


class RowsConfig(Frozen):
    """How rows are read as examples."""

    kind: Kind = "conversation"
    """Of the examples; empty for that of the one layout that fits the columns."""
    layout: str = Field(default="", max_length=64)
    """Name of the layout, as listed in docs/data-formats.md; empty for the one that fits the columns."""
    ignored: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(default=(), max_length=1024)
    """Columns to leave out; any other column that the layout doesn't know is an error."""
    read: Literal["auto", "copy", "in_place"] = "auto"
    """When: once, into a data set that holds them checked, or each time they are used, from where they are. By itself
    "auto" copies up to 64 GiB of files and reads more in place. Batches are the same."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """Rows that can't be used: an error that lists them, or left out and counted."""
    heads: Annotated[tuple[HeadConfig, ...], BeforeValidator(_as_tuple)] = Field(default=(), max_length=256)
    """Output heads that a row's labels must fit; empty: whatever they are."""
    verifiers: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(default=(), max_length=1024)
    """Names that a prompt's `verifier` may have; empty for those of the rewards that there are."""

"""How rows become packed batches."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lib.config.base import Frozen, Number
from lib.config.chat import ChatConfig


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class WeightAt(Frozen):
    """A point of a weight's schedule."""

    step: int = Field(ge=0)
    """Optimizer steps that are done before the one whose rows are drawn."""
    weight: Number = Field(ge=0.0)
    """Between two points the weight changes evenly; before the first and after the last it stays."""


class MixtureSource(Frozen):
    """One source of a mixture."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Its rows are shuffled by this name, and the report shows its share under it."""
    location: str = Field(default="", max_length=4096)
    """Path or URL of its rows, or of an ingested data set; empty: the workflow's own data."""
    digest: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """Of what is at the location, so that a changed content is a changed input; a run without it is refused and names it."""
    weight: Number = Field(default=1.0, gt=0.0)
    """Its share of the rows, relative to the other sources' weights; 1 for all is the same share for each."""
    schedule: Annotated[tuple[WeightAt, ...], BeforeValidator(_as_tuple)] = ()
    """In place of `weight`: weights that change over the run."""
    max_epochs: int | None = Field(default=None, ge=1)
    """Times its rows are used; then its weight goes to the other sources. None: again and again."""
    max_rows: int | None = Field(default=None, ge=1)
    """Rows of it that a run uses, likewise."""

    @property
    def capped(self) -> bool:
        return self.max_epochs is not None or self.max_rows is not None

    @model_validator(mode="after")
    def _one_weight(self) -> "MixtureSource":
        if self.schedule and self.weight != 1.0:  # values that have travelled have all fields set
            raise ValueError(f"source {self.name!r} has both weight and schedule; give one of them")
        steps = [point.step for point in self.schedule]
        if steps != sorted(set(steps)):
            raise ValueError(f"source {self.name!r}: the steps of its schedule ({steps}) must rise")
        if self.schedule and not any(point.weight for point in self.schedule):
            raise ValueError(f"source {self.name!r} has weight 0 at every step; leave it out")
        return self

    def weight_at(self, step: int) -> float:
        """Its weight at an optimizer step, before the temperature."""
        points = self.schedule
        if not points:
            return self.weight
        if step <= points[0].step:
            return points[0].weight
        for left, right in pairwise(points):
            if step <= right.step:
                done = (step - left.step) / (right.step - left.step)
                return left.weight + (right.weight - left.weight) * done
        return points[-1].weight


class DataConfig(ChatConfig):
    """Streaming, mixing, masking and packing."""

    seed: int = Field(default=0, ge=0)
    """Orders the samples; the order is a function of the data, this section and, with schedules, of the rows in a step."""
    num_streams: int = Field(default=64, ge=1, le=4096)
    """Virtual streams the corpus is split into, independent of the number of ranks; a multiple of the ranks."""
    shuffle_rows: int = Field(default=1024, ge=1, le=1 << 20)
    """Consecutive rows of a stream that are shuffled together; 1 keeps the order of files. Held in memory by each stream."""
    mixture: Annotated[tuple[MixtureSource, ...], BeforeValidator(_as_tuple)] = Field(default=(), max_length=256)
    """Sources and their shares; empty: the workflow's own data alone."""
    temperature: Number = Field(default=1.0, gt=0.0, le=100.0)
    """Of the mixture: weights are taken to the power of 1 / temperature, so more than 1 makes shares more alike."""
    packing: Literal["pack", "pad"] = "pack"
    """Several documents in a row, or, for comparison, one document in each."""
    open_packs: int = Field(default=16, ge=1, le=1024)
    """Packs a stream keeps open while it looks for the best fit."""
    max_delay: int = Field(default=1024, ge=1, le=1 << 20)
    """Further rows of a stream after which an open pack is closed, full or not."""
    long_rows: Literal["refuse", "drop", "truncate", "split"] = "refuse"
    """Rows longer than the sequence: an error naming them, dropped and counted, cut at the end and counted, or cut into
    several documents that keep every target once."""
    tokenize_first: bool = False
    """Tokenise the workflow's own data in a cached task before training, for data that several runs use. Changes no batch."""
    workers: int = Field(default=1, ge=0, le=64)
    """Background workers of a rank that prepare its batches; 0 prepares them between steps. Changes no batch."""
    worker_kind: Literal["thread", "process"] = "thread"
    """Threads share the rank's interpreter; processes have their own, for decoding that keeps the rank from its device."""
    prefetch_batches: int = Field(default=4, ge=1, le=64)
    """Batches the background workers prepare ahead."""

    @model_validator(mode="after")
    def _mixture_is_possible(self) -> "DataConfig":
        names = [source.name for source in self.mixture]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"mixture has two sources of the name {twice[0]!r}; give each its own")
        if sum(not source.location for source in self.mixture) > 1:
            raise ValueError("mixture names the workflow's own data (an empty location) twice; give the others a location")
        if self.mixture and all(source.capped for source in self.mixture):
            raise ValueError(
                "every source of the mixture has max_epochs or max_rows, so it could end too soon; leave one without"
            )
        for step in sorted({point.step for source in self.mixture for point in source.schedule}):
            if not any(source.weight_at(step) for source in self.mixture):
                raise ValueError(f"at step {step} every source of the mixture has weight 0")
        if self.temperature != 1.0 and len(self.mixture) < 2:
            raise ValueError(f"temperature ({self.temperature}) is of a mixture, and there are no two sources to mix")
        return self

    @property
    def chat(self) -> ChatConfig:
        """The part that decides token ids and masks."""
        return ChatConfig.model_validate({name: getattr(self, name) for name in ChatConfig.model_fields})

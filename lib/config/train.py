"""One training run: batches, checkpoints, tracking."""

from typing import Literal

from pydantic import Field, model_validator

from lib.config.base import Frozen, Number

ReduceGradients = Literal["each_step", "each_micro_batch"]


class ProfileConfig(Frozen):
    """Steps that torch.profiler watches, on every rank."""

    first_step: int = Field(default=2, ge=1)
    """The first of them; step 1 pays for what is set up once."""
    num_steps: int = Field(default=1, ge=1, le=100)
    """How many; a trace grows by megabytes a step."""

    @property
    def last_step(self) -> int:
        return self.first_step + self.num_steps - 1


class TrainConfig(Frozen):
    """Batch shape, checkpoints and deadlines."""

    seed: int = Field(default=0, ge=0)
    rows_per_step: int = Field(default=2, ge=1)
    """Packed rows in the global batch of an optimizer step, over all ranks and micro-batches."""
    rows_per_micro_batch: int = Field(default=1, ge=1)
    """Packed rows a rank takes in one forward pass; the rest of its share is accumulated."""
    reduce_gradients: ReduceGradients = "each_step"
    """When ranks sum up their gradients. each_step: in the last micro-batch, and until then each holds whole ones.
    each_micro_batch: in each, and a rank holds its pieces alone, for as many more transfers."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept in the run folder; older ones go only after a newer one is published."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints of steps that are multiples of this are kept for ever; a multiple of checkpoint_every."""
    keep_best: int = Field(default=0, ge=0)
    """As many checkpoints whose step had the lowest training loss are kept as well."""
    export_dtype: Literal["model", "float32", "bfloat16", "float16"] = "model"
    """Dtype of the weights that a run writes at its end. model: each tensor as the model that was trained stores it."""
    max_restarts: int = Field(default=3, ge=0)
    """Times the workers are started again from the last checkpoint after one has died."""
    step_deadline_seconds: Number = Field(default=1800.0, gt=0.0)
    """A step that takes longer ends the run as an infrastructure error."""
    grace_seconds: Number = Field(default=30.0, gt=0.0)
    """After SIGTERM to the driver, which spot machines send before they go: time to end the step and to save it."""
    profile: ProfileConfig | None = None
    """Write a trace of some steps to the run folder; None: none. Changes no number."""

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> "TrainConfig":
        if self.rows_per_step % self.rows_per_micro_batch:
            raise ValueError(
                f"rows_per_step ({self.rows_per_step}) is not a multiple of rows_per_micro_batch ({self.rows_per_micro_batch})"
            )
        return self

    @model_validator(mode="after")
    def _kept_steps_are_saved(self) -> "TrainConfig":
        if self.keep_every and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every ({self.keep_every}) is not a multiple of checkpoint_every ({self.checkpoint_every}): there is no "
                "checkpoint of such a step"
            )
        return self


class TrackingConfig(Frozen):
    """Where metrics go beside the run folder's metrics.jsonl."""

    mlflow: bool = True
    experiment: str = Field(default="postflyte", min_length=1, max_length=128)
    """Name of the MLflow experiment."""

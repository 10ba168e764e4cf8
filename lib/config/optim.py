"""Optimizer and learning-rate schedule."""

from pydantic import Field, model_validator

from lib.config.base import Frozen, Number


class OptimConfig(Frozen):
    """AdamW with linear warm-up and cosine decay; the peak learning rate is an input of the workflow."""

    warmup_steps: int = Field(default=10, ge=0)
    """Steps of linear rise to the peak."""
    final_fraction: Number = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate of the last step as a fraction of the peak."""
    beta1: Number = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: Number = Field(default=0.95, ge=0.0, lt=1.0)
    epsilon: Number = Field(default=1e-8, gt=0.0)
    weight_decay: Number = Field(default=0.0, ge=0.0)
    """Decoupled; applied to matrices only."""
    max_grad_norm: Number = Field(default=1.0, gt=0.0)
    """The global gradient norm is clipped to this."""

    @model_validator(mode="after")
    def _betas_are_ordered(self) -> "OptimConfig":
        if self.beta1 > self.beta2:
            raise ValueError(f"beta1 ({self.beta1}) is greater than beta2 ({self.beta2}); swap them")
        return self

"""How a model is run."""

from typing import Literal

from pydantic import Field

from lib.config.base import Frozen


class ModelConfig(Frozen):
    """Precision and memory of the forward and backward pass."""

    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of matrix products; master weights, norms' statistics, softmax and loss stay float32."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: about 22 % slower, memory of one layer's activations."""
    loss_chunk_tokens: int = Field(default=1024, ge=1)
    """Trained tokens projected to the vocabulary at a time; bounds the memory of logits."""

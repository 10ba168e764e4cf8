"""How a model is run, and which of its weights are trained."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lib.config.base import Frozen, Number

LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down", "experts", "embed", "head"]
"""q, k, v, o: the projections of attention; gate, up, down: those of an MLP; experts: those of all experts; embed: the
embedding, and with it the head where the two are tied; head: a head of its own."""
FullTarget = Literal["norms", "router", "embed", "head"]
"""norms: all of them; router: what sends tokens to experts; embed, head: as above."""


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class LoraConfig(Frozen):
    """Train low-rank adapters beside frozen weights: W + scale * B A."""

    rank: int = Field(default=16, ge=1, le=1024)
    """Rows of A and columns of B."""
    alpha: Number = Field(default=32.0, gt=0.0)
    """scale is alpha / rank."""
    rslora: bool = False
    """scale is alpha / sqrt(rank), so that adapters of a high rank learn as fast."""
    dropout: Number = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of an adapter's inputs that are zero in each step; an embedding's adapter has none."""
    targets: Annotated[tuple[LoraTarget, ...] | None, BeforeValidator(_as_tuple)] = None
    """What gets adapters; None: all projections of attention and MLPs that the model has, experts excepted."""
    train_fully: Annotated[tuple[FullTarget, ...], BeforeValidator(_as_tuple)] = ()
    """What is trained itself, without adapters."""

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @model_validator(mode="after")
    def _each_once(self) -> "LoraConfig":
        targets = self.targets or ()
        if both := sorted(set(targets) & set(self.train_fully)):
            raise ValueError(f"{both[0]!r} is in targets and in train_fully; choose one of the two")
        if self.targets == () and not self.train_fully:
            raise ValueError("targets and train_fully are both empty, so nothing would be trained")
        if repeated := sorted({name for names in (targets, self.train_fully) for name in names if names.count(name) > 1}):
            raise ValueError(f"{repeated[0]!r} is named twice")
        return self


class ModelConfig(Frozen):
    """Precision and memory of the forward and backward pass, and what is trained."""

    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of matrix products; master weights, norms' statistics, softmax and loss stay float32."""
    activation_checkpointing: Literal["none", "layer", "selective"] = "none"
    """What the backward pass computes again: nothing; each layer, about 22 % slower, for the memory of one layer's
    activations; or all of a layer but its products with weights, for the memory of what lies between them."""
    compile: Literal["none", "layer"] = "none"
    """Make code for each kind of layer by torch.compile: half a minute at the start of a run, for fewer passes over memory
    between matrix products."""
    loss_chunk_tokens: int = Field(default=1024, ge=1)
    """Trained tokens projected to the vocabulary at a time; bounds the memory of logits."""
    lora: LoraConfig | None = None
    """Train adapters in place of all weights; see docs/lora.md."""

    @model_validator(mode="after")
    def _compiled_whole(self) -> "ModelConfig":
        if self.compile == "layer" and self.activation_checkpointing == "selective":
            raise ValueError(
                "activation_checkpointing 'selective' picks operations of a layer, and a compiled layer has none; set "
                "activation_checkpointing to 'layer' or 'none', or leave compile out"
            )
        return self

"""What a decoder is, in numbers: everything that decides its function except the weights."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts."""

    kind: Literal["linear", "llama3"]
    factor: float
    """Slow frequencies (all of them for "linear") are divided by this."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_positions / low_freq_factor are fully stretched."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_positions / high_freq_factor are left alone."""
    original_max_positions: int = 8192
    """llama3: context length before stretching."""


@dataclass(frozen=True)
class DecoderSpec:
    """A pre-norm decoder with grouped-query attention, rotary positions and a gated MLP."""

    family: str
    """Name in lib/models/families.py: whose weight names and quirks apply."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Divides num_heads; query head n reads key-value head n // (num_heads / num_kv_heads)."""
    head_dim: int
    """Even; needs not be hidden_size / num_heads."""
    max_positions: int
    """Longest document the model was made for."""
    rope_theta: float
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None
    norm_eps: float
    """Added to the mean square inside RMSNorm."""
    tied: bool
    """The output projection is the embedding."""
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def num_parameters(self) -> int:
        """Trainable numbers; a tied head counts once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        attention += self.attention_bias * (self.head_dim * (self.num_heads + 2 * self.num_kv_heads) + self.hidden_size)
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        vocabulary = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * (attention + mlp + 2 * self.hidden_size) + self.hidden_size + vocabulary

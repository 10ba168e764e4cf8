"""What a decoder is, in numbers: everything that decides its function except the weights."""

from dataclasses import dataclass
from typing import Literal

ROW_MULTIPLE = 64
"""Of the rows of embedding and head, so that matrix products meet full tiles and every split over ranks divides."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    """Slow frequencies (all of them for "linear") are divided by this."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_positions / low_freq_factor are fully stretched."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_positions / high_freq_factor are left alone."""
    original_max_positions: int = 8192
    """llama3, yarn: context length before stretching."""
    fast_rotations: float = 32.0
    """yarn: channels that turn more often than this within the original context are left alone."""
    slow_rotations: float = 1.0
    """yarn: channels that turn less often than this are fully stretched."""
    whole_channels: bool = True
    """yarn: the borders between the two are rounded to whole channels."""
    magnitude: float = 1.0
    """yarn: cosines and sines are multiplied by this."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer."""

    theta: float
    """Base of the frequencies."""
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class Gate:
    """How the two halves of a gated MLP become one: `act(gate) * up`."""

    kind: Literal["silu", "gelu_tanh", "clamped"]
    """"clamped": gate is cut above at `limit`, up on both sides; gate * sigmoid(alpha * gate) * (up + 1)."""
    alpha: float = 1.0
    limit: float = 0.0


@dataclass(frozen=True)
class MoeSpec:
    """Experts in place of the MLP of some layers."""

    layers: tuple[int, ...]
    """Numbers of the layers that have experts; the others have an MLP."""
    num_experts: int
    top_k: int
    """Experts that each token goes through."""
    intermediate_size: int
    """Of one expert."""
    weights: Literal["softmax", "softmax_renormalised", "softmax_of_chosen"]
    """An expert's share in the output: its probability among all; that, divided by the sum over the chosen; or its
    probability among the chosen, from their logits alone."""
    bias: bool = False
    """Router and experts have biases."""


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder with grouped-query attention, rotary positions and gated MLPs or experts."""

    family: str
    """Name in lib/models/families.py: whose weight names apply."""
    vocab_size: int
    """Ids; a checkpoint has a row for each and no others."""
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
    rope: Rope
    norm_eps: float
    """Added to the mean square inside RMSNorm."""
    tied: bool
    """The output projection is the embedding."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    windows: tuple[int | None, ...] = ()
    """Of each layer: a query sees at most this many keys, its own included; None: all. Empty: no layer has a window."""
    local_rope: Rope | None = None
    """Rotary positions of the layers with a window; None: those of the others."""
    query_scale: float | None = None
    """Scores are multiplied by this; None: head_dim ** -0.5."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """RMSNorm of queries and keys before rotation, of each head or over all heads together."""
    sinks: bool = False
    """Each head has a learned score that takes its share of the softmax and gives nothing."""
    attention_softcap: float | None = None
    """Scores become cap * tanh(score / cap)."""
    norm_order: Literal["pre", "post", "both"] = "pre"
    """Norm before attention and MLP, after each (inside the residual), or both."""
    norm_offset: float = 0.0
    """Added to the weights of all norms."""
    gate: Gate = Gate("silu")
    embed_scale: float = 1.0
    """Embeddings are multiplied by this, rounded to their dtype."""
    logit_softcap: float | None = None
    """Logits become cap * tanh(logit / cap)."""
    moe: MoeSpec | None = None
    lm_head: bool = True
    """False: no logits of tokens are made; what the model puts out is made beside it, see lib/models/heads.py."""

    def __post_init__(self) -> None:
        assert len(self.windows) in (0, self.num_layers), f"{len(self.windows)} windows for {self.num_layers} layers"

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layers

    @property
    def num_rows(self) -> int:
        """Rows of embedding and head in memory: one for each id, and zeros up to a multiple of ROW_MULTIPLE.

        The further rows get no token, no probability and no gradient, and are never written.
        """
        return -(-self.vocab_size // ROW_MULTIPLE) * ROW_MULTIPLE

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, rows without an id left out; a tied head counts once."""
        query, kv = self.head_dim * self.num_heads, self.head_dim * self.num_kv_heads
        attention = self.hidden_size * (2 * query + 2 * kv)
        attention += self.qkv_bias * (query + 2 * kv) + self.o_bias * self.hidden_size + self.sinks * self.num_heads
        attention += {"none": 0, "head": 2 * self.head_dim, "all": query + kv}[self.qk_norm]
        norms = (4 if self.norm_order == "both" else 2) * self.hidden_size
        mlps = sum(self._num_mlp_parameters(layer) for layer in range(self.num_layers))
        vocabulary = self.vocab_size * self.hidden_size * (2 if self.lm_head and not self.tied else 1)
        return self.num_layers * (attention + norms) + mlps + self.hidden_size + vocabulary

    def _num_mlp_parameters(self, layer: int) -> int:
        if self.moe is None or not self.has_experts(layer):
            size, bias = self.intermediate_size, self.mlp_bias
            return 3 * self.hidden_size * size + bias * (2 * size + self.hidden_size)
        size, bias = self.moe.intermediate_size, self.moe.bias
        expert = 3 * self.hidden_size * size + bias * (2 * size + self.hidden_size)
        return self.moe.num_experts * (expert + self.hidden_size + bias)

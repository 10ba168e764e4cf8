"""Gated MLP: down(act(gate(x)) * up(x))."""

import torch
from torch import nn

from lib.models.spec import DecoderSpec, Gate


class Mlp(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.kind = spec.gate
        self.gate = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.up = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(gated(self.kind, self.gate(x_BTD), self.up(x_BTD)))
        return hidden


def gated(kind: Gate, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """One value of two; see `Gate`."""
    if kind.kind == "silu":
        return nn.functional.silu(gate) * up
    if kind.kind == "gelu_tanh":
        return nn.functional.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=kind.limit), up.clamp(-kind.limit, kind.limit)
    return gate * torch.sigmoid(kind.alpha * gate) * (up + 1)

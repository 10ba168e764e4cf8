"""Linear maps of many experts over rows that are sorted by expert.

Letters: P rows, one for each pair of a token and an expert it goes through; E experts; I and O input and output features.

On GPU one grouped product does all experts. On CPU each expert of each document is computed by itself: there a product
rounds a row by how many rows there are, and a function rounds by where in the tensor a number stands, and so a document
would change the last bits of others if they were computed together.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from lib.models.layers.mlp import gated
from lib.models.spec import DecoderSpec, MoeSpec


class Groups(NamedTuple):
    """Which rows belong to which expert."""

    expert_P: torch.Tensor
    """[P] expert of each row."""
    ends_E: torch.Tensor | None
    """[E] int32 where the rows of each expert end; on GPU."""
    sizes: list[tuple[int, int]]
    """(expert, number of rows) of consecutive rows; on CPU."""


class GroupedLinear(nn.Module):
    """A linear map for each expert; weights as in nn.Linear, with the expert in front."""

    def __init__(self, num_experts: int, num_inputs: int, num_outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.zeros(num_experts, num_outputs)) if bias else None

    def forward(self, x_PI: torch.Tensor, groups: Groups) -> torch.Tensor:
        """[P, I] rows sorted by expert -> [P, O], all experts in one product."""
        output: torch.Tensor = nn.functional.grouped_mm(x_PI, self.weight.mT, offs=groups.ends_E)
        return output if self.bias is None else output + self.bias[groups.expert_P]

    def one_by_one(self) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """(rows, expert) -> their product. The weights are taken apart once, so that their gradient is put together once,
        with zeros where an expert had no rows."""
        weights = self.weight.unbind()
        biases = [None] * len(weights) if self.bias is None else self.bias.unbind()
        return lambda x_PI, expert: nn.functional.linear(x_PI, weights[expert], biases[expert])


class Experts(nn.Module):
    """A gated MLP for each expert."""

    def __init__(self, spec: DecoderSpec, moe: MoeSpec) -> None:
        super().__init__()
        self.kind = spec.gate
        self.gate = GroupedLinear(moe.num_experts, spec.hidden_size, moe.intermediate_size, moe.bias)
        self.up = GroupedLinear(moe.num_experts, spec.hidden_size, moe.intermediate_size, moe.bias)
        self.down = GroupedLinear(moe.num_experts, moe.intermediate_size, spec.hidden_size, moe.bias)

    def forward(self, x_PD: torch.Tensor, groups: Groups) -> torch.Tensor:
        """[P, D] -> [P, D], in the order of `groups`."""
        if groups.ends_E is not None:
            output: torch.Tensor = self.down(gated(self.kind, self.gate(x_PD, groups), self.up(x_PD, groups)), groups)
            return output
        gate, up, down = (part.one_by_one() for part in (self.gate, self.up, self.down))
        outputs = []
        for x, (expert, _) in zip(torch.split(x_PD, [size for _, size in groups.sizes]), groups.sizes):
            own = x.clone()  # at an address of its own, aligned alike wherever in the batch the rows come from
            outputs.append(down(gated(self.kind, gate(own, expert), up(own, expert)), expert))
        return torch.cat(outputs)

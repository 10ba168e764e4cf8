"""Low-rank adapters beside frozen weights: y = x (W + scale * B A)^T, and W + scale * B A is never formed while training.

Each adapted layer is its plain layer with one more module, `lora`, so that all names of the plain decoder stay. The factors
are `lora.a` [..., R, I] and `lora.b` [..., O, R] for a weight [..., O, I]; b begins as zeros, and the layer as its plain self.

Letters: I inputs, O outputs, R rank, E experts, P rows sorted by expert, V vocabulary, D model.
"""

from collections.abc import Callable

import torch
from torch import nn

from lib.config.model import LoraConfig
from lib.models.layers.experts import GroupedLinear, Groups


class LowRank(nn.Module):
    """The two factors of what is added to a weight. Source: Hu et al. 2021; scale of rsLoRA: Kalajdzievski 2023."""

    def __init__(self, weight: torch.Tensor, config: LoraConfig) -> None:
        super().__init__()
        *experts, num_outputs, num_inputs = weight.shape
        a_shape, b_shape = (*experts, config.rank, num_inputs), (*experts, num_outputs, config.rank)
        self.a = nn.Parameter(torch.zeros(a_shape, dtype=torch.float32, device=weight.device))  # see `initial_factor`
        self.b = nn.Parameter(torch.zeros(b_shape, dtype=torch.float32, device=weight.device))
        self.scale, self.dropout = config.scale, config.dropout

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """x with a share of its numbers zero and the others larger, while training."""
        return nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def shrink(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., R], scaled."""
        return nn.functional.linear(self.drop(x), self.a) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]"""
        return nn.functional.linear(self.shrink(x), self.b)


class AdaptedLinear(nn.Linear):
    """A linear layer and its adapter."""

    def __init__(self, plain: nn.Linear, config: LoraConfig) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.lora = LowRank(plain.weight, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(x) + self.lora(x)
        return output


class AdaptedEmbedding(nn.Embedding):
    """An embedding and its adapter, which a tied head shares. There is no dropout of token ids."""

    def __init__(self, plain: nn.Embedding, config: LoraConfig) -> None:
        super().__init__(plain.num_embeddings, plain.embedding_dim, device="meta")
        self.weight = plain.weight
        self.lora = LowRank(plain.weight, config)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        low = nn.functional.embedding(token_ids, self.lora.b) * self.lora.scale
        return super().forward(token_ids) + low @ self.lora.a


class AdaptedGroupedLinear(GroupedLinear):
    """Linear maps of many experts, each with an adapter of its own."""

    def __init__(self, plain: GroupedLinear, config: LoraConfig) -> None:
        num_experts, num_outputs, num_inputs = plain.weight.shape
        with torch.device("meta"):
            super().__init__(num_experts, num_inputs, num_outputs, plain.bias is not None)
        self.weight, self.bias = plain.weight, plain.bias
        self.lora = LowRank(plain.weight, config)

    def forward(self, x_PI: torch.Tensor, groups: Groups) -> torch.Tensor:
        low_PR = nn.functional.grouped_mm(self.lora.drop(x_PI), self.lora.a.mT, offs=groups.ends_E) * self.lora.scale
        low_PO: torch.Tensor = nn.functional.grouped_mm(low_PR, self.lora.b.mT, offs=groups.ends_E)
        return super().forward(x_PI, groups) + low_PO

    def one_by_one(self) -> Callable[[torch.Tensor, int], torch.Tensor]:
        plain, a, b, lora = super().one_by_one(), self.lora.a.unbind(), self.lora.b.unbind(), self.lora

        def product(x_PI: torch.Tensor, expert: int) -> torch.Tensor:
            low_PR = nn.functional.linear(lora.drop(x_PI), a[expert]) * lora.scale
            return plain(x_PI, expert) + nn.functional.linear(low_PR, b[expert])

        return product


Adapted = AdaptedLinear | AdaptedEmbedding | AdaptedGroupedLinear


def adapted(plain: nn.Module, config: LoraConfig) -> Adapted:
    """The layer with an adapter, around the same weight."""
    if isinstance(plain, nn.Linear):
        return AdaptedLinear(plain, config)
    if isinstance(plain, nn.Embedding):
        return AdaptedEmbedding(plain, config)
    assert isinstance(plain, GroupedLinear), f"no adapter for a {type(plain).__name__}"
    return AdaptedGroupedLinear(plain, config)

"""A mixture of experts: each token goes through the top_k experts that its router scores highest. No token is dropped.

Letters: B rows, T tokens, D model, E experts, N tokens that are not padding, C experts of a token (top_k).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lib.models.layers.documents import DocumentLayout
from lib.models.layers.experts import Experts, Groups
from lib.models.spec import DecoderSpec, MoeSpec


class RouterLoad(NamedTuple):
    """What a layer's router did with the tokens that are not padding. Sums, so that those of ranks and batches add up."""

    num_tokens: torch.Tensor
    """() int64"""
    tokens_E: torch.Tensor
    """[E] int64 tokens sent to each expert; they sum to num_tokens * top_k."""
    probability_E: torch.Tensor
    """[E] float32 sum of each expert's probability; carries a gradient."""
    square_logsumexp: torch.Tensor
    """() float32 sum of logsumexp(logits) ** 2; carries a gradient."""


class Moe(nn.Module):
    """Router and experts in place of an MLP."""

    def __init__(self, spec: DecoderSpec, moe: MoeSpec) -> None:
        super().__init__()
        self.moe = moe
        self.router = nn.Linear(spec.hidden_size, moe.num_experts, bias=moe.bias)
        self.experts = Experts(spec, moe)
        self.expert_bias = nn.Buffer(torch.zeros(moe.num_experts, dtype=torch.float32))
        """[E] added to the scores when experts are chosen, not to their weights; see `balance_experts`."""

    def forward(self, x_BTD: torch.Tensor, layout: DocumentLayout) -> tuple[torch.Tensor, RouterLoad]:
        """[B, T, D] -> [B, T, D], zero on padding; and the load."""
        tokens_N, document_N = _real_tokens(layout, x_BTD.device)
        x_ND = x_BTD.flatten(0, 1).index_select(0, tokens_N)
        weights_NC, experts_NC, load = self._route(x_ND)
        groups, order_P = _groups(experts_NC, document_N, self.moe.num_experts)
        x_PD = x_ND.index_select(0, order_P // self.moe.top_k)
        # Back in the order of the tokens, and summed in the order of their experts: the same bits every time.
        y_NCD = self.experts(x_PD, groups).index_select(0, order_P.argsort()).unflatten(0, experts_NC.shape)
        y_ND = (y_NCD * weights_NC.to(y_NCD.dtype)[..., None]).sum(1)
        zeros_TD = torch.zeros_like(x_BTD).flatten(0, 1)
        return zeros_TD.index_copy(0, tokens_N, y_ND).view(x_BTD.shape), load

    def _route(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, RouterLoad]:
        """(weights [N, C] float32, float64 for float64 inputs; experts [N, C]; load)."""
        logits_NE = self.router(x_ND).to(torch.promote_types(x_ND.dtype, torch.float32))
        probabilities_NE = logits_NE.softmax(-1)
        scores_NE = logits_NE if self.moe.weights == "softmax_of_chosen" else probabilities_NE
        experts_NC = (scores_NE.detach() + self.expert_bias).topk(self.moe.top_k, dim=-1).indices
        weights_NC = scores_NE.gather(-1, experts_NC)
        if self.moe.weights == "softmax_of_chosen":
            weights_NC = weights_NC.softmax(-1)
        elif self.moe.weights == "softmax_renormalised":
            weights_NC = weights_NC / weights_NC.sum(-1, keepdim=True)
        load = RouterLoad(
            num_tokens=torch.tensor(x_ND.shape[0], device=x_ND.device),
            tokens_E=torch.zeros_like(self.expert_bias, dtype=torch.int64).index_add(
                0, experts_NC.flatten(), torch.ones_like(experts_NC).flatten()
            ),
            probability_E=probabilities_NE.sum(0),
            square_logsumexp=logits_NE.logsumexp(-1).square().sum(),
        )
        return weights_NC, experts_NC, load


def load_balancing_loss(loads: Sequence[RouterLoad]) -> torch.Tensor:
    """Mean over layers of E * sum over experts of (share of tokens) * (mean probability); top_k where all is even.

    Padding has no part in it, and neither has how documents are packed. Each layer is balanced by itself: shares pooled
    over layers would let one layer's crowded expert make up for another's idle one.

    Args:
        loads: of each layer with experts; of one batch, or added up over batches.
    Source: Fedus et al. 2021, equations 4 to 6, with top_k experts a token as in transformers.
    """
    losses = []
    for load in loads:
        num_tokens = load.num_tokens.clamp(min=1)
        shares_E, means_E = load.tokens_E / num_tokens, load.probability_E / num_tokens
        losses.append(len(shares_E) * (shares_E * means_E).sum())
    return torch.stack(losses).mean()


def router_z_loss(loads: Sequence[RouterLoad]) -> torch.Tensor:
    """Mean over layers and tokens of logsumexp(logits) ** 2, which keeps logits small. Source: Zoph et al. 2022, equation 5."""
    return torch.stack([load.square_logsumexp / load.num_tokens.clamp(min=1) for load in loads]).mean()


@torch.no_grad()
def balance_experts(moe: Moe, tokens_E: torch.Tensor, rate: float) -> None:
    """Move a layer's expert bias one step towards even load, in place: up by `rate` below the mean, down above it.

    Args:
        tokens_E: [E] tokens sent to each expert, over all ranks, or the ranks' biases would drift apart.
    Source: Wang et al. 2024, "Auxiliary-loss-free load balancing", algorithm 1.
    """
    tokens_E = tokens_E.float()
    moe.expert_bias.add_(torch.sign(tokens_E.mean() - tokens_E), alpha=rate)


def _real_tokens(layout: DocumentLayout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """([N] flat positions of the tokens that are not padding, [N] number of each one's document)."""
    key = f"real_tokens {device}"
    if key not in layout.derived:
        ranges = layout.flat_ranges()
        tokens = [torch.arange(start, end) for start, end in ranges]
        documents = [torch.full((end - start,), number) for number, (start, end) in enumerate(ranges)]
        none = torch.zeros(0, dtype=torch.int64)
        layout.derived[key] = tuple(torch.cat([none, *parts]).to(device) for parts in (tokens, documents))
    found: tuple[torch.Tensor, torch.Tensor] = layout.derived[key]
    return found


def _groups(experts_NC: torch.Tensor, document_N: torch.Tensor, num_experts: int) -> tuple[Groups, torch.Tensor]:
    """The pairs of token and expert, sorted by expert; and [P] where each sorted pair stood in [N, C]."""
    expert_P = experts_NC.flatten()
    if expert_P.device.type != "cpu":
        order_P = expert_P.argsort(stable=True)
        counts_E = torch.zeros(num_experts, dtype=torch.int32, device=expert_P.device)
        counts_E = counts_E.index_add(0, expert_P, torch.ones_like(expert_P, dtype=torch.int32))
        return Groups(expert_P[order_P], counts_E.cumsum(0, dtype=torch.int32), []), order_P
    num_documents = int(document_N.max()) + 1 if len(document_N) else 1
    key_P = expert_P * num_documents + document_N[:, None].expand_as(experts_NC).flatten()
    order_P = key_P.argsort(stable=True)
    keys, sizes = torch.unique_consecutive(key_P[order_P], return_counts=True)
    pairs = list(zip((keys // num_documents).tolist(), sizes.tolist()))
    return Groups(expert_P[order_P], None, pairs or [(0, 0)]), order_P

"""RMSNorm with statistics in float32. Source: Zhang and Sennrich 2019; eps inside the root, as in transformers."""

import torch
from torch import nn


class RmsNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension."""

    def __init__(self, num_features: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_features,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[-1],)
        if not self.offset:
            return nn.functional.rms_norm(x, shape, self.weight, self.eps)
        # In bfloat16, 1 + weight would lose most of the weight's digits: the product is float32, rounded once.
        scaled = nn.functional.rms_norm(x.float(), shape, None, self.eps) * (self.weight.float() + self.offset)
        return scaled.to(x.dtype)

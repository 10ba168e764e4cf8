"""Rotary positions: tables computed once for a forward pass, in float32, and their application.

Channels d and d + H/2 of a head are a pair, rotated by position * frequency[d] (the layout of transformers' llama).
Source: Su et al. 2021; frequency stretching as in transformers' modeling_rope_utils, yarn from Peng et al. 2023.
"""

import math

import torch

from lib.models.spec import Rope, RopeScaling

RotaryTables = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, each [B, T, 1, H/2] float32."""


def rotary_frequencies(rope: Rope, head_dim: int, device: torch.device) -> torch.Tensor:
    """[H/2] float32 radians a position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    if scaling.kind == "yarn":
        keep = _yarn_kept_share(rope.theta, scaling, head_dim, device)
        return stretched * (1 - keep) + frequencies * keep
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = (scaling.original_max_positions / wavelengths - low) / (high - low)
    blended = (1 - keep) * stretched + keep * frequencies
    blended = torch.where(wavelengths > scaling.original_max_positions / low, stretched, blended)
    return torch.where(wavelengths < scaling.original_max_positions / high, frequencies, blended)


def rotary_tables(rope: Rope, head_dim: int, positions_BT: torch.Tensor) -> RotaryTables:
    """Float32 whatever the compute dtype."""
    angles = positions_BT[..., None].float() * rotary_frequencies(rope, head_dim, positions_BT.device)
    magnitude = rope.scaling.magnitude if rope.scaling else 1.0
    return (angles.cos() * magnitude)[:, :, None, :], (angles.sin() * magnitude)[:, :, None, :]


def rotate(x_BTNH: torch.Tensor, tables: RotaryTables) -> torch.Tensor:
    """Turn each pair of channels by its angle; computed in float32, returned in the dtype of `x`."""
    cos, sin = tables
    first, second = x_BTNH.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTNH.dtype)


def _yarn_kept_share(theta: float, scaling: RopeScaling, head_dim: int, device: torch.device) -> torch.Tensor:
    """[H/2] 1 where a channel turns often enough to be left alone, 0 where it is stretched, a ramp between."""

    def channel_turning(rotations: float) -> float:
        return head_dim * math.log(scaling.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel_turning(scaling.fast_rotations), channel_turning(scaling.slow_rotations)
    if scaling.whole_channels:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    channels = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    return 1 - ((channels - low) / (high - low or 0.001)).clamp(0, 1)

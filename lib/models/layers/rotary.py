"""Rotary positions: tables computed once for a forward pass, in float32, and their application.

Channels d and d + H/2 of a head are a pair, rotated by position * frequency[d] (the layout of transformers' llama).
Source: Su et al. 2021; frequency stretching as in transformers' modeling_rope_utils.
"""

import math

import torch

from lib.models.spec import DecoderSpec


def rotary_frequencies(spec: DecoderSpec, device: torch.device) -> torch.Tensor:
    """[H/2] float32 radians a position."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=device) / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    stretched = frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = (scaling.original_max_positions / wavelengths - low) / (high - low)
    blended = (1 - keep) * stretched + keep * frequencies
    blended = torch.where(wavelengths > scaling.original_max_positions / low, stretched, blended)
    return torch.where(wavelengths < scaling.original_max_positions / high, frequencies, blended)


def rotary_tables(spec: DecoderSpec, positions_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the angles, each [B, T, 1, H/2] float32, whatever the compute dtype."""
    angles = positions_BT[..., None].float() * rotary_frequencies(spec, positions_BT.device)
    return angles.cos()[:, :, None, :], angles.sin()[:, :, None, :]


def rotate(x_BTNH: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn each pair of channels by its angle; computed in float32, returned in the dtype of `x`."""
    cos, sin = tables
    first, second = x_BTNH.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTNH.dtype)

"""Decoders with adapters whose every number is random."""

from pathlib import Path

import torch
from torch import nn

from lib.config.model import FullTarget, LoraConfig, LoraTarget
from lib.models.decoder import Decoder
from lib.models.hf_io import load_full, read_spec
from lib.models.lora import MODULES, fill_factors, is_factor, put_adapters
from lib.models.spec import DecoderSpec


def all_targets(spec: DecoderSpec) -> tuple[LoraTarget, ...]:
    """Every target that a model of this spec has, written down by hand."""
    attention: tuple[LoraTarget, ...] = ("q", "k", "v", "o", "embed")
    num_expert_layers = len(spec.moe.layers) if spec.moe else 0
    mlp: tuple[LoraTarget, ...] = ("gate", "up", "down") if num_expert_layers < spec.num_layers else ()
    experts: tuple[LoraTarget, ...] = ("experts",) if num_expert_layers else ()
    head: tuple[LoraTarget, ...] = () if spec.tied else ("head",)
    found = (*attention, *mlp, *experts, *head)
    assert set(found) <= set(MODULES)
    return found


def plain(folder: Path) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    return decoder


def with_adapters(
    folder: Path,
    *,
    rank: int = 3,
    alpha: float = 4.0,
    rslora: bool = False,
    dropout: float = 0.0,
    targets: tuple[LoraTarget, ...] | None = None,
    train_fully: tuple[FullTarget, ...] = (),
    random: bool = True,
) -> Decoder:
    """The folder's decoder with adapters on `targets` (None: on all there are); b is zero unless `random`."""
    decoder = plain(folder)
    chosen = all_targets(decoder.spec) if targets is None else targets
    chosen = tuple(target for target in chosen if target not in train_fully)
    config = LoraConfig(rank=rank, alpha=alpha, rslora=rslora, dropout=dropout, targets=chosen, train_fully=train_fully)
    put_adapters(decoder, config)
    fill_factors(decoder, seed=0)
    if random:
        randomise_b(decoder)
    return decoder


@torch.no_grad()
def randomise_b(decoder: nn.Module, spread: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in decoder.named_parameters():
        if is_factor(name) and name.endswith(".b"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)

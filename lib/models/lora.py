"""Adapters put on from outside, by module name, in one place for all families: what is adapted, frozen, and trained itself."""

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lib.config.model import FullTarget, LoraConfig, LoraTarget
from lib.core.errors import ConfigError
from lib.core.seeding import derive_seed
from lib.models.decoder import Decoder
from lib.models.layers.lora import Adapted, adapted
from lib.models.spec import DecoderSpec

_LAYER = r"layers\.\d+\."
MODULES: dict[LoraTarget, re.Pattern[str]] = {
    **{name: re.compile(rf"{_LAYER}attn\.{name}") for name in ("q", "k", "v", "o")},
    **{name: re.compile(rf"{_LAYER}mlp\.{name}") for name in ("gate", "up", "down")},
    "experts": re.compile(rf"{_LAYER}mlp\.experts\.(gate|up|down)"),
    "embed": re.compile("embed"),
    "head": re.compile("head"),
}
"""Target -> names of the modules that get an adapter."""
PARAMETERS: dict[FullTarget, re.Pattern[str]] = {
    "norms": re.compile(rf"({_LAYER}(attn\.)?\w*)?norm\.weight"),
    "router": re.compile(rf"{_LAYER}mlp\.router\.(weight|bias)"),
    "embed": re.compile(r"embed\.weight"),
    "head": re.compile(r"head\.weight"),
}
"""What is trained itself -> names of its parameters."""
DEFAULT_TARGETS: tuple[LoraTarget, ...] = ("q", "k", "v", "o", "gate", "up", "down")
_FACTOR = re.compile(r"(.+)\.lora\.(a|b)")


def put_adapters(decoder: Decoder, config: LoraConfig) -> None:
    """Freeze a decoder (it may be on the meta device), give it adapters in place, and leave only them and what is trained
    itself to be trained. New factors are zero until `fill_factors` or `lib.parallel.load.load_sharded` gives them values.

    Raises:
        ConfigError: the model has nothing that a target names.
    """
    targets = chosen_targets(config, decoder.spec)
    decoder.requires_grad_(False)
    for name, module in list(decoder.named_modules()):
        if any(MODULES[target].fullmatch(name) for target in targets):
            parent, _, leaf = name.rpartition(".")
            setattr(decoder.get_submodule(parent), leaf, adapted(module, config))
    for name, parameter in decoder.named_parameters():
        if any(PARAMETERS[target].fullmatch(name) for target in config.train_fully):
            parameter.requires_grad_(True)


def chosen_targets(config: LoraConfig, spec: DecoderSpec) -> tuple[LoraTarget, ...]:
    """What gets adapters in a decoder of `spec`.

    Raises:
        ConfigError: the model has nothing that a target, or a name in train_fully, means; says what it has.
    """
    with torch.device("meta"):
        decoder = Decoder(spec)
    modules, parameters = ([name for name, _ in part] for part in (decoder.named_modules(), decoder.named_parameters()))
    there = [target for target, pattern in MODULES.items() if _names(pattern, modules)]
    trainable = [target for target, pattern in PARAMETERS.items() if _names(pattern, parameters)]
    asked: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "targets": (config.targets or (), there),
        "train_fully": (config.train_fully, trainable),
    }
    for key, (names, known) in asked.items():
        for name in names:
            if name not in known:
                tied = "; its head is its embedding: name 'embed', which adapts both" if name == "head" else ""
                raise ConfigError(
                    f"config.model.lora.{key}: this {spec.family} model has no {name!r}; it has {', '.join(known)}{tied}"
                )
    return tuple(target for target in DEFAULT_TARGETS if target in there) if config.targets is None else config.targets


def _names(pattern: re.Pattern[str], names: Iterable[str]) -> bool:
    return any(pattern.fullmatch(name) for name in names)


def is_factor(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return _FACTOR.fullmatch(name) is not None


def adapters(decoder: nn.Module) -> dict[str, Adapted]:
    """Name -> adapted layer, in the order of the decoder."""
    return {name: module for name, module in decoder.named_modules() if isinstance(module, Adapted)}


def trained_shapes(spec: DecoderSpec, config: LoraConfig | None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter of a decoder that is trained, in its order.

    Raises:
        ConfigError: see `chosen_targets`.
    """
    with torch.device("meta"):
        decoder = Decoder(spec)
    if config is not None:
        put_adapters(decoder, config)
    return {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters() if parameter.requires_grad}


def num_trained(spec: DecoderSpec, config: LoraConfig | None) -> int:
    """Numbers in all of them, rows of embedding and head without an id left out."""
    return sum(
        math.prod(shape) // spec.num_rows * spec.vocab_size if _has_row_for_each_id(name) else math.prod(shape)
        for name, shape in trained_shapes(spec, config).items()
    )


def _has_row_for_each_id(name: str) -> bool:
    return name.partition(".")[0] in ("embed", "head") and not name.endswith(".lora.a")


def initial_factor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The first value of an adapter's parameter, whole: a function of its name and the seed alone, so the same on any
    number of ranks. b is zero; a is uniform within 1 / sqrt(inputs), as nn.Linear draws its weight (He et al. 2015)."""
    if name.endswith(".b"):
        return torch.zeros(shape)
    bound = shape[-1] ** -0.5
    generator = torch.Generator().manual_seed(derive_seed("lora", seed, name))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def fill_factors(decoder: Decoder, seed: int) -> None:
    """Give all adapters of a whole decoder their first values."""
    for name, parameter in decoder.named_parameters():
        if is_factor(name):
            parameter.copy_(initial_factor(name, tuple(parameter.shape), seed))


@torch.no_grad()
def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale * B A in float32, for whole tensors; rounded once more by whoever stores it in less."""
    return torch.add(weight.float(), b.float() @ a.float(), alpha=scale)

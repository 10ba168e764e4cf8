"""The parts of a decoder by one set of names, in every family: find them, or put others in their place."""

import re
from collections.abc import Callable
from typing import Literal

from torch import nn

from lib.core.errors import ModelError
from lib.models.decoder import Decoder
from lib.models.heads import OutputHead
from lib.models.layers.attention import Attention
from lib.models.layers.mlp import Mlp
from lib.models.layers.moe import Moe
from lib.models.layers.norm import RmsNorm

Component = Literal["Attention", "MLP", "Norm", "Head"]
_TYPES: dict[str, tuple[type[nn.Module], ...]] = {
    "Attention": (Attention,),
    "MLP": (Mlp, Moe),
    "Norm": (RmsNorm,),
    "Head": (OutputHead,),
}


def find(model: nn.Module, component: Component) -> dict[str, nn.Module]:
    """Name in the model -> module, in order of computation. "MLP" is a layer's MLP or its experts; "Head" is the language
    model's, where it is not tied to the embedding, and every output head.
    """
    if component not in _TYPES:
        raise ModelError(f"component {component!r} is unknown; known: {', '.join(_TYPES)}")
    found = {name: part for name, part in model.named_modules() if isinstance(part, _TYPES[component])}
    if component == "Head":
        heads = {f"{name}.head".lstrip("."): part for name, part in model.named_modules() if isinstance(part, Decoder)}
        found = {name: part.head for name, part in heads.items() if hasattr(part, "head")} | found
    return found


def swap(
    model: nn.Module, component: Component, make: Callable[[str, nn.Module], nn.Module], *, names: str = ".*"
) -> list[str]:
    """Put `make(name, module)` in the place of each component whose whole name matches; do it before sharding.

    The new module takes what the old one took and gives the same shapes. Checkpoints are read and written by the names of
    parameters, so a module with other parameters needs names for them in its family's table.

    Returns: names of those replaced.
    Raises:
        ModelError: there is none, so that a misspelt pattern doesn't go unnoticed.
    """
    chosen = {name: part for name, part in find(model, component).items() if re.fullmatch(names, name)}
    if not chosen:
        raise ModelError(f"no {component} has a name like {names!r}; there are {', '.join(find(model, component)) or 'none'}")
    for name, part in chosen.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, make(name, part))
    return list(chosen)

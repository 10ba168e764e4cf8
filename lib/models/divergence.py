"""Where our decoder and transformers part: the first module, in the order of computation, that got or gave other numbers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from lib.models.decoder import Decoder
from lib.models.layers.documents import DocumentLayout
from lib.models.logit_report import Divergence
from lib.models.weights import WeightTable

LIMIT = 1e-4
"""A difference of activations that is more than rounding, in units of the greatest |value| of the reference."""
Key = tuple[str, Literal["input", "output"]]
"""(name of our module, what of it)"""


@torch.no_grad()
def first_divergence(table: WeightTable, reference: nn.Module, decoder: Decoder, token_ids: torch.Tensor) -> Divergence:
    """The first tensor that differs for one document, or that none does.

    Args:
        table: the family's weight names; modules whose weights belong together are compared.
        token_ids: [T] of one document.
    """
    pairs = module_pairs(table, reference, decoder)
    ours: dict[Key, torch.Tensor] = {}
    theirs: dict[Key, torch.Tensor] = {}
    with _recording({name: decoder.get_submodule(name) for name in pairs}, ours):
        layout = DocumentLayout.from_document_ids(torch.zeros(1, len(token_ids)))
        decoder(token_ids[None], torch.arange(len(token_ids))[None], layout)
    with _recording({name: reference.get_submodule(other) for name, other in pairs.items()}, theirs):
        reference(token_ids[None], use_cache=False)
    for key, value in ours.items():
        difference = _difference(value, theirs.get(key))
        if not difference <= LIMIT:  # also true for NaN
            name, side = key
            return Divergence(module=name, side=side, reference_module=pairs[name], size=difference)
    return Divergence()


def module_pairs(table: WeightTable, reference: nn.Module, decoder: Decoder) -> dict[str, str]:
    """Our module -> theirs, for those that hold weights of one name and for what holds them.

    Left out: experts, whose rows stand in another order, and the embedding, which some scale inside and some outside.
    """
    known = [{name for name, _ in model.named_modules()} for model in (decoder, reference)]
    pairs: dict[str, str] = {}
    for stored, ours in table.items():
        if not isinstance(ours, str) or ".experts." in ours or ours.startswith("embed"):
            continue
        for i in range(decoder.spec.num_layers) if "{i}" in ours else (0,):
            one, other = ours.format(i=i), stored.format(i=i)
            while "." in one and "." in other:
                one, other = one.rpartition(".")[0], other.rpartition(".")[0]
                if one in known[0] and other in known[1] and one != "layers":
                    pairs[one] = other
    return pairs


@contextmanager
def _recording(modules: dict[str, nn.Module], found: dict[Key, torch.Tensor]) -> Iterator[None]:
    """Keep the first tensor that goes into and comes out of each module, in the order in which that happens."""

    def keep(key: Key) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None) -> None:
            values = [*args, *kwargs.values()] if output is None else output if isinstance(output, tuple) else [output]
            tensors = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
            if tensors:
                found.setdefault(key, tensors[0].detach().clone())

        return hook

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(keep((name, "input")), with_kwargs=True))
        handles.append(module.register_forward_hook(keep((name, "output")), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _difference(ours: torch.Tensor, theirs: torch.Tensor | None) -> float:
    """Relative to the greatest |value| of theirs; 0 where the two can't be laid over each other."""
    if theirs is None or ours.numel() != theirs.numel():
        return 0.0
    if theirs.shape != ours.shape and theirs.dim() == 4:  # heads before tokens
        theirs = theirs.transpose(1, 2)
    return float((ours.reshape(-1) - theirs.reshape(-1)).abs().max() / theirs.abs().max().clamp(min=1e-12))

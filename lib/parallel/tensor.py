"""Each layer computed by several ranks together, put on from outside; lib/parallel/plan.py says what is cut how.

The ranks of the tensor axis hold their parts of the weights as DTensors, and compute with them as plain tensors. What runs
through the residual stream is whole, and the same on all of them. They meet where a region ends, in the forward pass, and
where it begins, in the backward pass. No rank ever has a whole row of logits.
"""

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lib.losses.vocabulary_part import VocabularyPart
from lib.models.decoder import Decoder
from lib.models.heads import OutputHead
from lib.parallel.clock import CLOCK
from lib.parallel.mesh import TENSOR_AXIS
from lib.parallel.plan import CUT_BY_INPUTS, HEAD_NORM, Part, part_of

_DIMS = {Part.OUTPUTS: -2, Part.INPUTS: -1, Part.NUMBERS: -1}
"""Dimension that is cut."""


def cut_layers(module: nn.Module, mesh: DeviceMesh) -> None:
    """Cut a module that holds one decoder (it may be on the meta device) over the tensor axis, in place, before it is sharded.

    Its loss has to be computed with `vocabulary_part`. Without a tensor axis nothing is done.
    """
    if TENSOR_AXIS not in (mesh.mesh_dim_names or ()):
        return
    (decoder,) = (part for part in module.modules() if isinstance(part, Decoder))
    tensor_mesh, modules = mesh[TENSOR_AXIS], dict(module.named_modules())
    regions = {found["region"] for name in modules if (found := re.fullmatch(CUT_BY_INPUTS, name))}
    for name, part in modules.items():
        kind: type[_Cut] = _Cut
        if name in regions:
            kind = _Region
        elif part is decoder.embed:
            kind = _RowsOfIds
        elif part is decoder.norm:
            kind = _BeforeHead
        elif isinstance(part, OutputHead):
            kind = _OutputHead
        elif decoder.spec.qk_norm == "all" and re.fullmatch(HEAD_NORM, name):
            kind = _SpreadNorm
        if kind is _Cut and not part._parameters:
            continue
        part.__class__ = type(f"{kind.__name__}{type(part).__name__}", (kind, type(part)), {})
        assert isinstance(part, _Cut)
        part.cut(name, decoder, tensor_mesh)


def vocabulary_part(mesh: DeviceMesh, vocab_size: int) -> int | VocabularyPart:
    """The ids whose rows of the head a rank has under `cut_layers`: their number where it has all."""
    if TENSOR_AXIS not in (mesh.mesh_dim_names or ()):
        return vocab_size
    group = mesh.get_group(TENSOR_AXIS)

    def gather(x: torch.Tensor) -> torch.Tensor:
        gathered = x.new_empty((dist.get_world_size(group), *x.shape))
        with CLOCK.part("collective"):
            dist.all_gather(list(gathered.unbind()), x, group=group)
        return gathered

    return VocabularyPart(vocab_size, dist.get_rank(group), dist.get_world_size(group), gather)


class _Cut(nn.Module):
    """Mixed into a module whose parameters are cut: asked for by name, they are this rank's parts as plain tensors.

    Outside of forward and backward they are sharded on further axes, and then they are what they are.
    """

    def cut(self, name: str, decoder: Decoder, mesh: DeviceMesh) -> None:
        """Put this rank's parts in the place of the parameters."""
        self._group, self._rank = mesh.get_group(), mesh.get_local_rank()
        self._parts: dict[str, Part] = {}
        for leaf, parameter in self._parameters.items():
            if parameter is None:
                continue
            part = self._parts[leaf] = part_of(f"{name}.{leaf}", decoder.spec)
            dim = _DIMS.get(part)
            assert dim is None or parameter.shape[dim] % mesh.size() == 0, f"{name}.{leaf} {parameter.shape}: see check_plan"
            placement = Replicate() if dim is None else Shard(parameter.ndim + dim)
            whole, wanted = parameter.data, parameter.requires_grad
            cut = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
            self._parameters[leaf] = nn.Parameter(cut, requires_grad=wanted)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if not isinstance(value, DTensor) or value.device_mesh.ndim > 1:
            return value
        part = self._parts[name]
        local = value.to_local(grad_placements=[Partial()] if part is Part.SHARED else None)
        return _Once.apply(local, self._rank == 0) if part is Part.ONCE else local  # type: ignore[no-untyped-call]


class _Region(_Cut):
    """The result of each rank is an addend."""

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        return _leave(super().forward(_enter(x, self._group), *others), self._group)


class _RowsOfIds(_Cut):
    """An embedding: a rank looks up the ids whose rows it has."""

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        num_rows = self.weight.shape[0]
        own_ids = token_ids - self._rank * num_rows
        is_own = (own_ids >= 0) & (own_ids < num_rows)
        found = super().forward(own_ids.where(is_own, 0))
        return _leave(found.where(is_own[..., None], 0.0), self._group)


class _BeforeHead(_Cut):
    """The last norm: what follows is the head, of which each rank has a part."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _enter(super().forward(x), self._group)


class _OutputHead(_Cut):
    """A head that all ranks compute alike, of hidden states whose gradient is a sum over them: one rank's counts."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        once: torch.Tensor = _CountedOnce.apply(hidden, self._rank == 0)  # type: ignore[no-untyped-call]
        outputs: torch.Tensor = super().forward(once)
        return outputs


class _SpreadNorm(_Cut):
    """RmsNorm over features of which each rank has some."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.float()
        squares = _enter(_leave(values.square().sum(-1, keepdim=True), self._group), self._group)
        mean = squares / (x.shape[-1] * dist.get_world_size(self._group))
        scaled: torch.Tensor = values * torch.rsqrt(mean + self.eps) * (self.weight.float() + self.offset)
        return scaled.to(x.dtype)


def _enter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x, whose gradient is the sum of what the ranks find."""
    entered: torch.Tensor = _Enter.apply(x, group)  # type: ignore[no-untyped-call]
    return entered


def _leave(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of the ranks' x; the gradient of each addend is that of the sum."""
    left: torch.Tensor = _Leave.apply(x, group)  # type: ignore[no-untyped-call]
    return left


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(grads[0], ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _Once(torch.autograd.Function):
    """What one rank adds to a sum over the ranks. All ranks know the gradient of the sum, and so that of the addend."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, is_first: bool) -> torch.Tensor:
        return x.view_as(x) if is_first else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _CountedOnce(torch.autograd.Function):
    """x, whose gradient is that of one rank, and zero on the others."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, is_first: bool) -> torch.Tensor:
        ctx.is_first = is_first
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] if ctx.is_first else torch.zeros_like(grads[0]), None


def _summed(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    with CLOCK.part("collective"):
        dist.all_reduce(total, group=group)
    return total

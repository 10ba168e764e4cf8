"""Each layer computed by several ranks together, put on from outside; lib/parallel/plan.py says what is cut how.

The ranks of the tensor axis hold their parts of the weights as DTensors, and compute with them as plain tensors. Of what runs
through the residual stream each has the same tokens of every row: those are gathered where a region begins, and the addends
of its result are summed up where it ends, each token's where it belongs. No rank ever has a whole row of logits.
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
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.experts import Experts, Groups
from lib.models.layers.moe import Moe, RouterLoad
from lib.parallel.clock import CLOCK
from lib.parallel.collectives import added_once, apart, counted_once, enter, gathered, leave, scattered, together
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
            kind = _Experts if isinstance(part, Experts) else _Region
        elif part is decoder.embed:
            kind = _RowsOfIds
        elif part is decoder.norm:
            kind = _BeforeHead
        elif isinstance(part, OutputHead):
            kind = _OutputHead
        elif isinstance(part, Moe):
            kind = _Routed
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
        return added_once(local, self._rank == 0) if part is Part.ONCE else local


class _Region(_Cut):
    """Takes a rank's tokens and gives them back; in between, it has those of all, and computes an addend of their result."""

    def forward(self, x_BSD: torch.Tensor, *others: Any) -> torch.Tensor:
        return scattered(super().forward(gathered(x_BSD, self._group), *others), self._group)


class _Routed(_Cut):
    """Takes a rank's tokens and gives them back; in between, all ranks route those of all alike."""

    def forward(self, x_BSD: torch.Tensor, layout: DocumentLayout) -> tuple[torch.Tensor, RouterLoad]:
        y_BTD, load = super().forward(together(x_BSD, self._group), layout)
        return apart(y_BTD, self._group), load


class _Experts(_Cut):
    """Takes the rows of all ranks and gives their sum; a rank computes an addend."""

    def forward(self, x_PD: torch.Tensor, groups: Groups) -> torch.Tensor:
        return leave(super().forward(enter(x_PD, self._group), groups), self._group)


class _RowsOfIds(_Cut):
    """An embedding: a rank looks up the ids whose rows it has."""

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        num_rows = self.weight.shape[0]
        own_ids = token_ids - self._rank * num_rows
        is_own = (own_ids >= 0) & (own_ids < num_rows)
        found = super().forward(own_ids.where(is_own, 0))
        return scattered(found.where(is_own[..., None], 0.0), self._group)


class _BeforeHead(_Cut):
    """The last norm: what follows is the head, of which each rank has a part, for the tokens of all."""

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return gathered(super().forward(x_BSD), self._group)


class _OutputHead(_Cut):
    """A head that all ranks compute alike, of hidden states whose gradient is a sum over them: one rank's counts."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = super().forward(counted_once(hidden, self._rank == 0))
        return outputs


class _SpreadNorm(_Cut):
    """RmsNorm over features of which each rank has some."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.float()
        squares = enter(leave(values.square().sum(-1, keepdim=True), self._group), self._group)
        mean = squares / (x.shape[-1] * dist.get_world_size(self._group))
        scaled: torch.Tensor = values * torch.rsqrt(mean + self.eps) * (self.weight.float() + self.offset)
        return scaled.to(x.dtype)

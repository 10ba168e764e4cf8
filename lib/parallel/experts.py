"""Experts dealt out over ranks: each rank of the expert axis holds some, and rows travel to their experts and back.

Put on from outside, by module name. The ranks of this axis have rows of their own, so a rank's experts see the rows of all of
them and their gradients are whole; what is left to be summed is over the other axes of data. No row is dropped, and on CPU
each expert of each document is computed by itself, as on one rank, so that the forward pass has the same bits.

Letters: E experts, P rows, one for each pair of a token and an expert it goes through; Q those that came here from all ranks;
D model.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lib.models.layers.experts import Experts, Groups
from lib.models.layers.moe import RouterLoad
from lib.parallel.clock import CLOCK
from lib.parallel.collectives import leave, there_and_back

EXPERTS_NAME = re.compile(r"(?:.*\.)?layers\.\d+\.mlp\.experts")
"""Modules whose parameters have the expert as their first dimension."""


def deal_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Keep this rank's experts of a layer (it may be on the meta device) and have their rows brought to them.

    Args:
        mesh: of one axis, whose size divides the number of experts.
    """
    rank, num_ranks = mesh.get_local_rank(), mesh.size()
    for part in experts.modules():
        for name, parameter in part.named_parameters(recurse=False):
            assert parameter.shape[0] % num_ranks == 0, f"{parameter.shape[0]} experts on {num_ranks} ranks"
            own = parameter.detach().chunk(num_ranks)[rank].clone()
            dealt = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
            setattr(part, name, nn.Parameter(dealt, requires_grad=parameter.requires_grad))
    group, num_own = mesh.get_group(), experts.gate.weight.shape[0] // num_ranks

    def forward(x_PD: torch.Tensor, groups: Groups) -> torch.Tensor:
        with CLOCK.part("collective"):
            journey = _Journey(groups, num_own, group)
        x_QD = journey.out(x_PD)
        with _own_weights(experts):
            y_QD = Experts.forward(experts, x_QD, journey.groups)
        return journey.back(y_QD)

    experts.forward = forward  # type: ignore[method-assign]


def inner_shards(num_shards: int) -> Callable[[nn.Parameter], Shard]:
    """How the shard axis cuts an expert's weight: along its largest dimension that divides, the first of equals; so a rank
    holds a plain box of the whole. `num_shards` must divide one of them, see `lib.parallel.plan.check_plan`."""

    def placement(parameter: nn.Parameter) -> Shard:
        fitting = [dim for dim in range(1, parameter.ndim) if parameter.shape[dim] % num_shards == 0]
        assert fitting, f"{num_shards} shards divide no dimension of an expert's {tuple(parameter.shape[1:])}"
        return Shard(max(fitting, key=lambda dim: parameter.shape[dim]))

    return placement


@contextmanager
def _own_weights(experts: nn.Module) -> Iterator[None]:
    """Within, the modules see this rank's experts as plain tensors; gradients go to the distributed ones."""
    shadowed = []
    try:
        for part in experts.modules():
            for name, parameter in part.named_parameters(recurse=False):
                assert isinstance(parameter, DTensor), name
                vars(part)[name] = parameter.to_local()
                shadowed.append((part, name))
        yield
    finally:
        for part, name in shadowed:
            del vars(part)[name]


class _Journey:
    """The way of a layer's rows to the ranks of their experts, and back."""

    def __init__(self, groups: Groups, num_own: int, group: dist.ProcessGroup) -> None:
        """All ranks of the group must build theirs together."""
        sizes = groups.sizes if groups.ends_E is None else _all_sizes(groups.ends_E)
        parts: list[list[tuple[int, int]]] = [[] for _ in range(dist.get_world_size(group))]
        for expert, size in sizes:
            if size:
                parts[expert // num_own].append((expert % num_own, size))
        tables = _exchange_tables(parts, groups.expert_P.device, group)
        self._sent, self._received = ([sum(size for _, size in table) for table in ways] for ways in (parts, tables))
        self._group = group
        self.groups, self._order_Q = self._here([pair for table in tables for pair in table], num_own, groups)

    def out(self, x_PD: torch.Tensor) -> torch.Tensor:
        """[P, D] -> [Q, D] in the order of `groups`."""
        x_QD = self._travel(x_PD, self._sent, self._received)
        return x_QD if self._order_Q is None else x_QD.index_select(0, self._order_Q)

    def back(self, y_QD: torch.Tensor) -> torch.Tensor:
        """[Q, D] -> [P, D], each row where it came from."""
        y_QD = y_QD if self._order_Q is None else y_QD.index_select(0, self._order_Q.argsort())
        return self._travel(y_QD, self._received, self._sent)

    def _travel(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """Consecutive rows to each rank, and those of each rank after one another; gradients go back the same way."""
        there = partial(_exchange, sent=sent, received=received, group=self._group)
        back = partial(_exchange, sent=received, received=sent, group=self._group)
        return there_and_back(rows, there, back)

    @staticmethod
    def _here(pairs: list[tuple[int, int]], num_own: int, groups: Groups) -> tuple[Groups, torch.Tensor | None]:
        """The groups that this rank computes, from (own expert, rows) as they come; and, where one product does all experts
        and rows must be sorted by them, the order."""
        device = groups.expert_P.device
        experts, sizes = (
            torch.tensor(column, dtype=torch.int64, device=device) for column in (zip(*pairs) if pairs else ((), ()))
        )
        expert_Q = experts.repeat_interleave(sizes)
        if groups.ends_E is None:
            return Groups(expert_Q, None, pairs or [(0, 0)]), None
        order_Q = expert_Q.argsort(stable=True)
        ends = torch.zeros(num_own, dtype=torch.int64, device=device).index_add(0, experts, sizes).cumsum(0, dtype=torch.int32)
        return Groups(expert_Q[order_Q], ends, []), order_Q


def _all_sizes(ends_E: torch.Tensor) -> list[tuple[int, int]]:
    return list(enumerate(ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()))


def _exchange_tables(
    parts: Sequence[Sequence[tuple[int, int]]], device: torch.device, group: dist.ProcessGroup
) -> list[list[tuple[int, int]]]:
    """[rank] pairs that each rank has for this one, from those that this one has for each."""
    lengths = torch.tensor([2 * len(part) for part in parts], device=device)
    theirs = torch.empty_like(lengths)
    dist.all_to_all_single(theirs, lengths, group=group)
    sent, received = lengths.tolist(), theirs.tolist()
    flat = torch.tensor([number for part in parts for pair in part for number in pair], dtype=torch.int64, device=device)
    found = torch.empty(sum(received), dtype=torch.int64, device=device)
    dist.all_to_all_single(found, flat, received, sent, group=group)
    return [list(zip(*[iter(part.tolist())] * 2)) for part in torch.split(found, received)]


def _exchange(rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    output = rows.new_empty(sum(received), *rows.shape[1:])
    with CLOCK.part("collective"):
        dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group)
    return output


def loads_of_all_ranks(loads: Sequence[RouterLoad], group: dist.ProcessGroup) -> list[RouterLoad]:
    """The load of each layer over the rows of all ranks of a group, which must all call this.

    Each rank may make the same loss of them: its gradient is that of its own part, and the parts of all ranks add up to the
    whole, as those of any loss do.

    Args:
        group: ranks that each have rows of their own, so none two of which compute the same ones together.
    """
    return [RouterLoad(*(leave(part, group) for part in load)) for load in loads]

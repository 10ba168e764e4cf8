"""Gather and reduce between CPU ranks of one host through memory that they share, instead of through sockets.

Each rank owns a buffer of two slots that its peers map. A collective goes in pieces: write the own piece into a slot,
meet the others at a barrier, read theirs. The next piece uses the other slot, so one barrier a piece is enough: a slot
is written again only after everybody has come to the barrier of the piece after it, and so has finished reading it.
Sums are made in the order of the ranks: the same bits every time. Memory is anonymous (memfd): it needs no /dev/shm of a
certain size and is gone with the processes, however they die. Letters: R ranks, S numbers of a shard, W of a piece.
"""

import mmap
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from lib.parallel.clock import CLOCK

SLOT_BYTES = 16 << 20


class HostMemory:
    """Buffers of all ranks of a group, mapped into this process."""

    def __init__(self, group: dist.ProcessGroup, maps: Sequence[mmap.mmap]) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self._buffers = [torch.frombuffer(shared, dtype=torch.uint8) for shared in maps]
        self._num_pieces = 0

    @staticmethod
    def open(group: dist.ProcessGroup) -> "HostMemory | None":
        """Map the buffers of all ranks; None, on all ranks alike, where they can't be shared (several hosts or containers)."""
        if not hasattr(os, "memfd_create"):
            return None
        own = os.memfd_create("postflyte-rank")
        os.ftruncate(own, 2 * SLOT_BYTES)
        addresses = [torch.zeros(2, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
        dist.all_gather(addresses, torch.tensor([os.getpid(), own]), group=group)
        maps = _map_all([(int(pid), int(fd)) for pid, fd in addresses], dist.get_rank(group), group)
        works = torch.tensor(int(maps is not None))
        dist.all_reduce(works, op=dist.ReduceOp.MIN, group=group)
        os.close(own)  # the maps stay
        return HostMemory(group, maps) if maps is not None and works.item() else None

    def next_slots(self) -> list[torch.Tensor]:
        """The slot of each rank for the next piece, [SLOT_BYTES] uint8 each."""
        start = self._num_pieces % 2 * SLOT_BYTES
        self._num_pieces += 1
        return [buffer[start : start + SLOT_BYTES] for buffer in self._buffers]

    def meet(self) -> None:
        """Wait until all ranks have written; the group's timeout is the deadline."""
        dist.barrier(group=self.group)


class SharedAllGather(AllGather):
    """Every rank gets the shards of all, in the order of the ranks."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @CLOCK.part("collective")
    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        shard_S = input_tensor.view(torch.uint8)
        gathered_RS = output_tensor.view(torch.uint8).view(-1, shard_S.numel())
        for start, end in _pieces(shard_S.numel(), SLOT_BYTES):
            slots = self.memory.next_slots()
            slots[self.memory.rank][: end - start] = shard_S[start:end]
            self.memory.meet()
            for rank, slot in enumerate(slots):
                if rank != self.memory.rank or gathered_RS[rank].data_ptr() != shard_S.data_ptr():
                    gathered_RS[rank, start:end] = slot[: end - start]


class SharedReduceScatter(ReduceScatter):
    """Each rank gets the sum of its shard over all ranks."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @CLOCK.part("collective")
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM, f"shards are summed, not {op}"
        rank, num_ranks = self.memory.rank, dist.get_world_size(group)
        values_RS = input_tensor.view(num_ranks, -1)
        for start, end in _pieces(values_RS.shape[1], SLOT_BYTES // (num_ranks * values_RS.element_size())):
            slots_RW = [_matrix(slot, num_ranks, end - start, values_RS.dtype) for slot in self.memory.next_slots()]
            slots_RW[rank].copy_(values_RS[:, start:end])
            self.memory.meet()
            sum_W = output_tensor[start:end]
            torch.add(slots_RW[0][rank], slots_RW[1][rank], out=sum_W)
            for other_RW in slots_RW[2:]:
                sum_W += other_RW[rank]


def _matrix(slot: torch.Tensor, num_rows: int, num_columns: int, dtype: torch.dtype) -> torch.Tensor:
    return slot.view(dtype)[: num_rows * num_columns].view(num_rows, num_columns)


def _pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)


def _map_all(addresses: list[tuple[int, int]], own_rank: int, group: dist.ProcessGroup) -> list[mmap.mmap] | None:
    """Map each rank's buffer through /proc; None where one isn't there or isn't what its rank says it is."""
    maps = []
    try:
        for pid, descriptor in addresses:
            opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)
            maps.append(mmap.mmap(opened, 2 * SLOT_BYTES))
            os.close(opened)
    except (OSError, ValueError):
        maps = []
    if maps:
        maps[own_rank][:8] = (own_rank + 1).to_bytes(8, "little")
    dist.barrier(group=group)
    marks = [int.from_bytes(shared[:8], "little") for shared in maps]
    return maps if marks and marks == list(range(1, len(marks) + 1)) else None

"""Transfers between the ranks that compute a layer together, with the gradients that belong to them.

Two kinds of gradient meet here. What only some ranks use is found in shares, which must be summed; what all compute alike has a
whole gradient on each of them, which must not be. Letters: B rows, T tokens, S those of a row that a rank has, R ranks,
D model.
"""

from typing import Any

import torch
import torch.distributed as dist

from lib.parallel.clock import CLOCK


def gathered(x_BSD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The tokens of all ranks; the gradient of a rank's own is the sum of what the ranks find."""
    whole: torch.Tensor = _Gather.apply(x_BSD, group)  # type: ignore[no-untyped-call]
    return whole


def scattered(x_BTD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Of the sum of the ranks' x, a rank's own tokens; the gradient of each addend is that of all tokens."""
    own: torch.Tensor = _Scatter.apply(x_BTD, group)  # type: ignore[no-untyped-call]
    return own


def added_once(x: torch.Tensor, is_first: bool) -> torch.Tensor:
    """What one rank adds to a sum over the ranks. All know the gradient of the sum, and so that of the addend."""
    addend: torch.Tensor = _AddedOnce.apply(x, is_first)  # type: ignore[no-untyped-call]
    return addend


def counted_once(x: torch.Tensor, is_first: bool) -> torch.Tensor:
    """x, for what all compute alike from here on, where its gradient is a sum over the ranks: one rank's counts."""
    counted: torch.Tensor = _CountedOnce.apply(x, is_first)  # type: ignore[no-untyped-call]
    return counted


def together(x_BSD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The tokens of all ranks, for what all compute alike from here on: each then knows the whole gradient."""
    whole: torch.Tensor = _Together.apply(x_BSD, group)  # type: ignore[no-untyped-call]
    return whole


def apart(x_BTD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A rank's own tokens of what all computed alike: the gradient of all comes from those that have the tokens."""
    own: torch.Tensor = _Apart.apply(x_BTD, group)  # type: ignore[no-untyped-call]
    return own


def enter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x, whose gradient is the sum of what the ranks find."""
    entered: torch.Tensor = _Enter.apply(x, group)  # type: ignore[no-untyped-call]
    return entered


def leave(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of the ranks' x; the gradient of each addend is that of the sum."""
    left: torch.Tensor = _Leave.apply(x, group)  # type: ignore[no-untyped-call]
    return left


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_tokens(x_BSD, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum_of_own_tokens(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _sum_of_own_tokens(x_BTD, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_tokens(grads[0], ctx.group), None


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_tokens(x_BSD, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _own_tokens(grads[0], ctx.group), None


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _own_tokens(x_BTD, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_tokens(grads[0], ctx.group), None


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


class _AddedOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, is_first: bool) -> torch.Tensor:
        return x.view_as(x) if is_first else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _CountedOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, is_first: bool) -> torch.Tensor:
        ctx.is_first = is_first
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] if ctx.is_first else torch.zeros_like(grads[0]), None


def _all_tokens(x_BSD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    num_ranks, (num_rows, *others) = dist.get_world_size(group), x_BSD.shape
    gathered = x_BSD.new_empty((num_ranks * num_rows, *others))
    with CLOCK.part("collective"):
        dist.all_gather_single(gathered, x_BSD.contiguous(), group=group)
    return gathered.view(num_ranks, *x_BSD.shape).movedim(0, 1).flatten(1, 2)


def _sum_of_own_tokens(x_BTD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    num_rows, _, *others = x_BTD.shape
    parts_RBSD = x_BTD.reshape(num_rows, dist.get_world_size(group), -1, *others).movedim(1, 0).contiguous()
    own_BSD = torch.empty_like(parts_RBSD[0])
    with CLOCK.part("collective"):
        dist.reduce_scatter_single(own_BSD, parts_RBSD.flatten(0, 1), group=group)
    return own_BSD


def _own_tokens(x_BTD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x_BTD.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)].contiguous()


def _summed(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    with CLOCK.part("collective"):
        dist.all_reduce(total, group=group)
    return total

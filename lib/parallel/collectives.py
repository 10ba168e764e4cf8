"""Transfers between the ranks that compute a layer together, with the gradients that belong to them.

Two kinds of gradient meet here. What only some ranks use is found in shares, which must be summed; what all compute alike has a
whole gradient on each of them, which must not be. Letters: B rows, T tokens, S those of a row that a rank has, R ranks,
D model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lib.parallel.clock import CLOCK


def gathered(x_BSD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The tokens of all ranks; the gradient of a rank's own is the sum of what the ranks find."""
    return there_and_back(x_BSD, partial(_all_tokens, group=group), partial(_sum_of_own_tokens, group=group))


def scattered(x_BTD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Of the sum of the ranks' x, a rank's own tokens; the gradient of each addend is that of all tokens."""
    return there_and_back(x_BTD, partial(_sum_of_own_tokens, group=group), partial(_all_tokens, group=group))


def together(x_BSD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The tokens of all ranks, for what all compute alike from here on: each then knows the whole gradient."""
    return there_and_back(x_BSD, partial(_all_tokens, group=group), partial(_own_tokens, group=group))


def apart(x_BTD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A rank's own tokens of what all computed alike: the gradient of all comes from those that have the tokens."""
    return there_and_back(x_BTD, partial(_own_tokens, group=group), partial(_all_tokens, group=group))


def enter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x, whose gradient is the sum of what the ranks find."""
    return there_and_back(x, _same, partial(_summed, group=group))


def leave(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of the ranks' x; the gradient of each addend is that of the sum."""
    return there_and_back(x, partial(_summed, group=group), _same)


def added_once(x: torch.Tensor, is_first: bool) -> torch.Tensor:
    """What one rank adds to a sum over the ranks. All know the gradient of the sum, and so that of the addend."""
    return there_and_back(x, _same if is_first else torch.zeros_like, _same)


def counted_once(x: torch.Tensor, is_first: bool) -> torch.Tensor:
    """x, for what all compute alike from here on, where its gradient is a sum over the ranks: one rank's counts."""
    return there_and_back(x, _same, _same if is_first else torch.zeros_like)


Way = Callable[[torch.Tensor], torch.Tensor]


def there_and_back(x: torch.Tensor, there: Way, back: Way) -> torch.Tensor:
    """`there` of x, whose gradient is `back` of that of the result."""
    result: torch.Tensor = _ThereAndBack.apply(x, there, back)  # type: ignore[no-untyped-call]
    return result


class _ThereAndBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: Way, back: Way) -> torch.Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.back(grads[0]), None, None


def _same(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


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

"""The loss of a head in parts, each computed by itself, is that of the whole head."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lib.core.examples import IGNORE_INDEX
from lib.losses.cross_entropy import cross_entropy_sum
from lib.losses.vocabulary_part import VocabularyPart

N, D, L, ROWS = 19, 12, 3, 64


class Exchange:
    """Lets threads, one for each part, see what all of them bring."""

    def __init__(self, num_parts: int) -> None:
        self._meet = threading.Barrier(num_parts)
        self._brought: dict[int, torch.Tensor] = {}

    def gather(self, index: int, own: torch.Tensor) -> torch.Tensor:
        self._brought[index] = own
        self._meet.wait(60)
        gathered = torch.stack([brought for _, brought in sorted(self._brought.items())])
        self._meet.wait(60)
        return gathered


def losses(num_parts: int, vocab_size: int, softcap: float | None, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """For each part: [loss, right ones, gradients of hidden, rows, the adapter's x, the adapter's rows]."""
    generator = torch.Generator().manual_seed(vocab_size)
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(ROWS, D, generator=generator) / 3
    low, low_weight = torch.randn(N, L, generator=generator), torch.randn(ROWS, L, generator=generator) / 3
    labels = torch.randint(vocab_size, (N,), generator=generator)
    labels[::4] = IGNORE_INDEX
    factors, exchange = torch.rand(N, generator=generator), Exchange(num_parts)

    def part(index: int) -> list[torch.Tensor]:
        rows = slice(index * ROWS // num_parts, (index + 1) * ROWS // num_parts)
        leaves = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight[rows], low, low_weight[rows])]
        vocabulary = VocabularyPart(vocab_size, index, num_parts, lambda own: exchange.gather(index, own))
        whole = vocab_size if num_parts == 1 else vocabulary
        loss = cross_entropy_sum(
            *(leaves[0], leaves[1], labels, 5),
            vocab_size=whole,
            softcap=softcap,
            factors=factors,
            adapter=(leaves[2], leaves[3]),
        )
        (loss.total * 0.3).backward()
        return [loss.total.detach(), loss.metrics["num_correct"], *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    with ThreadPoolExecutor(num_parts) as threads:
        return list(threads.map(part, range(num_parts)))


@pytest.mark.parametrize("num_parts", [2, 4])
@pytest.mark.parametrize("vocab_size", [1, 17, 40, ROWS])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_parts_are_the_whole(num_parts: int, vocab_size: int, softcap: float | None) -> None:
    """In float64 to 1e-12: the loss on every part, gradients of rows side by side, of inputs as a sum; with padding, and with
    parts that have nothing but padding."""
    (whole,) = losses(1, vocab_size, softcap, torch.float64)
    parts = losses(num_parts, vocab_size, softcap, torch.float64)
    for found in parts:
        torch.testing.assert_close(found[0], whole[0], rtol=1e-12, atol=1e-12)
        assert found[1] == whole[1]
    for place, combine in ((2, sum), (3, torch.cat), (4, sum), (5, torch.cat)):
        torch.testing.assert_close(combine([found[place] for found in parts]), whole[place], rtol=1e-11, atol=1e-12)


def test_parts_agree_to_the_last_bit() -> None:
    """In bfloat16 too, whose statistics are float32: ranks that had other losses would have other weights."""
    first, second = losses(2, 50, None, torch.bfloat16)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    (whole,) = losses(1, 50, None, torch.bfloat16)
    torch.testing.assert_close(first[0], whole[0], rtol=1e-3, atol=0)

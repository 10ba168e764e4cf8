"""Document attention on CPU: ours against PyTorch's fused kernel with a dense mask, forward and backward, one thread.

`python -m benchmarks attention [--rounds 3] [--tokens 1024 2048 4096] [--heads 16] [--kv-heads 8] [--head-dim 128]`

Each row holds 16 documents of random lengths. The dense mask says the same: causal, within a document. The ideal is the
time of the multiply-adds that the pairs which see each other need, at the rate of this machine's matrix products.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.floor import measure_floor
from benchmarks.report import Report, interleaved_cpu_seconds, medians
from lib.models.layers.attention_cpu import document_attention_cpu
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.scores import Scores

NUM_DOCUMENTS = 16
TARGET_SPEED, TARGET_SHARE = 8.0, 0.5
TARGET_TOKENS = 4096

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_lengths(num_tokens: int) -> list[int]:
    """Tokens of each document: log-normal shares (sigma 0.5) of the row, the same every time."""
    shares = np.random.default_rng(0).lognormal(0.0, 0.5, NUM_DOCUMENTS)
    ends = np.round(np.cumsum(shares) / shares.sum() * num_tokens).astype(int)
    return np.diff(ends, prepend=0).tolist()


def make_inputs(options: argparse.Namespace, num_tokens: int) -> Inputs:
    """q [1, T, N, H], k and v [1, T, K, H]."""
    generator = torch.Generator().manual_seed(0)
    heads = (options.heads, options.kv_heads, options.kv_heads)
    q, k, v = (torch.randn(1, num_tokens, count, options.head_dim, generator=generator) for count in heads)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def race(options: argparse.Namespace, num_tokens: int, gflops: float) -> dict[str, float]:
    """CPU seconds of both, our share of the ideal, and the greatest difference of outputs and gradients."""
    lengths = make_lengths(num_tokens)
    ids_T = torch.arange(NUM_DOCUMENTS).repeat_interleave(torch.tensor(lengths))
    layout = DocumentLayout.from_document_ids(ids_T[None])
    positions = torch.arange(num_tokens)
    sees_TT = (positions[:, None] >= positions) & (ids_T[:, None] == ids_T)
    inputs = make_inputs(options, num_tokens)
    scores = Scores(options.head_dim**-0.5)
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))

    def ours() -> torch.Tensor:
        return document_attention_cpu(*inputs, layout, scores)

    def dense() -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs)
        return scaled_dot_product_attention(q, k, v, attn_mask=sees_TT, enable_gqa=True).transpose(1, 2)

    def run(attend: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        for tensor in inputs:
            tensor.grad = None
        output = attend()
        output.backward(weight)
        return [output.detach(), *(tensor.grad for tensor in inputs)]

    difference = max(float((found - expected).abs().max()) for found, expected in zip(run(ours), run(dense)))
    seconds = medians(
        interleaved_cpu_seconds({"ours": lambda: run(ours), "sdpa_dense_mask": lambda: run(dense)}, rounds=options.rounds)
    )
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    ideal = 3 * 2 * 2 * pairs * options.heads * options.head_dim / gflops / 1e9
    return {**seconds, "share_of_ideal": ideal / seconds["ours"], "max_difference": difference}


def main(arguments: Sequence[str]) -> None:
    """Race at each number of tokens; the targets are for 4,096."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks attention")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    options = parser.parse_args(arguments)
    floor = measure_floor()
    report = Report("attention", peers={"sdpa_dense_mask": {}}, details={"documents": NUM_DOCUMENTS, "options": vars(options)})
    for num_tokens in options.tokens:
        found = race(options, num_tokens, floor["fp32_gflops"])
        figure = f"cpu_seconds_{num_tokens}"
        report.ours[figure] = found["ours"]
        report.ours[f"share_of_ideal_{num_tokens}"] = found["share_of_ideal"]
        report.peers["sdpa_dense_mask"][figure] = found["sdpa_dense_mask"]
        report.details[f"max_difference_{num_tokens}"] = found["max_difference"]
        wanted = num_tokens == TARGET_TOKENS
        report.compare(figure, "sdpa_dense_mask", smaller_is_better=True, target=TARGET_SPEED if wanted else None)
        if wanted:
            report.targets[f"share_of_ideal_{num_tokens}"] = TARGET_SHARE
    report.print(floor)

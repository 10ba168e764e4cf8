"""The FLOP counter of lib/models/flops.py against operations that torch counts while a decoder runs.

For every family: random small models (the ones of the logit gate), all weights trained and with several kinds of LoRA, and
with other heads than the language model's. The trace is a real forward and backward pass of decoder and loss. torch takes a
fused attention for a whole square whatever the kernel leaves out, so attention is traced apart: each query with exactly the
keys that it sees, the gradients wanted that the decoder itself wanted.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import Report, say
from lib.config.heads import HeadsConfig
from lib.config.model import LoraConfig, LoraTarget
from lib.losses.outputs import HeadTargets
from lib.models.decoder import Decoder
from lib.models.families import FAMILIES
from lib.models.flops import FlopCounter
from lib.models.heads import HeadedDecoder
from lib.models.layers.documents import DocumentLayout
from lib.models.lora import MODULES, fill_factors, put_adapters, trained_shapes
from lib.models.spec import DecoderSpec
from lib.models.verify_configs import random_case
from lib.train.heads import HeadsLossModule, HeadsObjective
from lib.train.step import LossModule

LENGTHS = ((10, 6), (16,))
"""Documents of each row; there is no padding, which torch would count."""
RANK = 4
ADDMM_IN_PLACE = torch.ops.aten.addmm_
LABELS = ["a", "b", "c", "d", "e"]
HEADS = {
    name: HeadsConfig.parse({"heads": heads}, where=name)
    for name, heads in {
        "scalar head": [{"name": "reward", "kind": "scalar"}],
        "classification head": [{"name": "topic", "kind": "classification", "labels": LABELS}],
        "multi-task heads": [
            {"name": "text", "kind": "lm", "weight": 0.2},
            {"name": "clicked", "kind": "scalar", "loss": "logistic"},
            {"name": "topic", "kind": "classification", "labels": LABELS},
            {"name": "worth", "kind": "scalar", "per": "token"},
        ],
    }.items()
}
"""What a decoder can put out beside, or in place of, the next token's logits."""
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, ADDMM_IN_PLACE)
"""Those of the layers. Attention makes its own by `bmm` or in a fused kernel, and is traced apart."""


@dataclass(frozen=True)
class Count:
    """Operations of one step."""

    counted: int
    traced: int

    @property
    def off(self) -> float:
        """Relative to what was traced."""
        return abs(self.counted - self.traced) / self.traced


def kinds(spec: DecoderSpec) -> dict[str, LoraConfig | None]:
    """What a decoder of `spec` can be trained with: everything, and adapters where they change the most about a count."""
    there: list[LoraTarget] = [target for target in MODULES if target in ("q", "k", "v", "o", "embed") or _has(spec, target)]
    vocabulary: tuple[LoraTarget, ...] = ("embed",) if spec.tied else ("head",)
    found: dict[str, LoraConfig | None] = {
        "full": None,
        "lora": LoraConfig(rank=RANK),
        "lora everywhere": LoraConfig(rank=RANK, targets=tuple(there)),
        "lora of outputs": LoraConfig(rank=RANK, targets=("o",)),
        "lora of values, norms in full": LoraConfig(rank=RANK, targets=("v",), train_fully=("norms",)),
        "lora of the head": LoraConfig(rank=RANK, targets=vocabulary),
        "head in full": LoraConfig(rank=RANK, targets=("q",), train_fully=vocabulary),  # type: ignore[arg-type]
    }
    if spec.moe:
        found["lora of experts"] = LoraConfig(rank=RANK, targets=("experts",))
        found["lora of keys, router in full"] = LoraConfig(rank=RANK, targets=("k",), train_fully=("router",))
    return found


def _has(spec: DecoderSpec, target: LoraTarget) -> bool:
    with torch.device("meta"):
        return any(MODULES[target].fullmatch(name) for name, _ in Decoder(spec).named_modules())


def measure(spec: DecoderSpec, lora: LoraConfig | None, heads: HeadsConfig | None = None) -> Count:
    """Count and trace one step of a decoder with random weights."""
    lengths = [length for row in LENGTHS for length in row]
    counter = FlopCounter(spec, lora, heads)
    counted = counter.step(
        num_tokens=sum(lengths),
        num_attention_products=counter.attention_products(lengths),
        num_targets=sum(lengths),
        num_documents=len(lengths),
    )
    headed = HeadedDecoder(spec, heads) if heads else None
    decoder = headed.decoder if headed else Decoder(spec)
    if lora:
        put_adapters(decoder, lora)
        fill_factors(decoder, seed=0)
    wanted = _wanted_gradients(decoder)
    with FlopCounterMode(display=False, custom_mapping={ADDMM_IN_PLACE: _addmm}) as trace:
        _loss(headed or decoder, spec).backward()
    products = sum(trace.get_flop_counts()["Global"].get(product, 0) for product in PRODUCTS)
    trained = {name for name, tensor in decoder.named_parameters() if tensor.grad is not None}
    assert trained == set(trained_shapes(decoder.spec, lora))
    return Count(counted, products + _traced_attention(spec, lengths, wanted))


def _loss(model: Decoder | HeadedDecoder, spec: DecoderSpec) -> torch.Tensor:
    token_ids, positions, labels, layout = _batch(spec)
    if isinstance(model, Decoder):
        total: torch.Tensor = LossModule(model, chunk_tokens=8)(token_ids, positions, labels, layout)[0]
        return total
    targets: dict[str, HeadTargets] = {}
    for head in model.config.heads:
        shape = labels.shape if head.by_token else (len(layout.spans),)
        values = labels if head.kind == "lm" else torch.zeros(shape, dtype=torch.int64 if head.labels else torch.float32)
        targets[head.name] = HeadTargets(values, torch.ones(shape))
    totals = HeadsLossModule(model, chunk_tokens=8)(token_ids, positions, layout, targets)
    loss: torch.Tensor = HeadsObjective(model.config).loss(totals, dict.fromkeys(targets, 1.0))
    return loss


def _addmm(_sum: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
    return 2 * left[0] * left[1] * right[1]


def _batch(spec: DecoderSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DocumentLayout]:
    documents = torch.tensor([[number for number, length in enumerate(row) for _ in range(length)] for row in LENGTHS])
    positions = torch.tensor([[position for length in row for position in range(length)] for row in LENGTHS])
    generator = torch.Generator().manual_seed(0)
    token_ids, labels = (torch.randint(spec.vocab_size, documents.shape, generator=generator) for _ in range(2))
    return token_ids, positions, labels, DocumentLayout.from_document_ids(documents)


def _wanted_gradients(decoder: Decoder) -> list[dict[str, bool]]:
    """Of each layer: whether the gradients of queries, keys and values are wanted; filled by a forward pass."""
    found: list[dict[str, bool]] = []
    for layer in decoder.layers:
        wanted: dict[str, bool] = {}
        found.append(wanted)
        for name, part in layer.get_submodule("attn").named_children():
            if name.partition("_")[0] in ("q", "k", "v"):
                part.register_forward_hook(_note(wanted, name.partition("_")[0]))
    return found


def _note(wanted: dict[str, bool], name: str):  # type: ignore[no-untyped-def]
    def note(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        wanted[name] = output.requires_grad

    return note


def _traced_attention(spec: DecoderSpec, lengths: Sequence[int], wanted: Sequence[dict[str, bool]]) -> int:
    with FlopCounterMode(display=False) as trace:
        for layer, wants in enumerate(wanted):
            for q, k, v, seen in _queries(spec, lengths, layer, wants):
                output = (q @ k[:, seen].mT).softmax(-1) @ v[:, seen]
                if output.requires_grad:
                    output.sum().backward()
    return int(trace.get_total_flops())


def _queries(
    spec: DecoderSpec, lengths: Sequence[int], layer: int, wants: dict[str, bool]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, slice]]:
    """(one query, keys, values, which of them it sees), of all heads."""
    for length in lengths:
        q, k, v = (torch.randn(spec.num_heads, length, spec.head_dim, requires_grad=wants[name]) for name in "qkv")
        window = spec.window(layer) or length
        for query in range(length):
            yield q[:, query : query + 1], k, v, slice(max(0, query + 1 - window), query + 1)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks flops")
    parser.add_argument("--configs", type=int, default=6, help="random models of each family")
    options = parser.parse_args(arguments)
    report = Report("flops")
    worst: dict[str, float] = {}
    for family in FAMILIES:
        for index in range(options.configs):
            spec = random_case(family, 0, index).spec
            for kind, lora in kinds(spec).items():
                count = measure(spec, lora)
                worst[f"{family}, {kind}"] = max(worst.get(f"{family}, {kind}", 0.0), count.off)
            for head, heads in HEADS.items():
                for kind, lora in {"full": None, "lora": LoraConfig(rank=RANK)}.items():
                    name = f"{family}, {head}, {kind}"
                    worst[name] = max(worst.get(name, 0.0), measure(spec, lora, heads).off)
        say(f"  {family}: at most {max(off for name, off in worst.items() if name.startswith(f'{family}, ')):.2%} off")
    report.ours = {"agreement": 1.0 - max(worst.values())}
    report.targets = {"agreement": 0.99}
    report.details = {"configs_of_each_family": options.configs, "rank": RANK, "greatest_share_off": worst}
    report.print()

"""What the backward pass computes again changes no bit of any gradient, and leaves less behind."""

from typing import Any, Literal

import pytest
import torch

from lib.config.model import LoraConfig
from lib.models.decoder import Decoder
from lib.models.lora import put_adapters
from lib.models.verify_configs import random_case
from lib.parallel.apply import recompute
from tests.lib.models.batches import packed

Kind = Literal["none", "layer", "selective"]
ROWS = [[9, 1, 17, 5], [23, 9]]


def trained(family: str, kind: Kind, dtype: torch.dtype, lora: LoraConfig | None) -> tuple[dict[str, Any], int]:
    """(gradients by name, bytes that the layers leave behind for the backward pass)."""
    torch.manual_seed(0)
    decoder = Decoder(random_case(family, 0, 1).spec).to(dtype)
    if lora is not None:
        put_adapters(decoder, lora)
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    storages: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    for layer in decoder.layers:
        recompute(layer, kind)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = decoder(*packed(ROWS, 38, decoder.spec.vocab_size))
    hidden.float().square().sum().backward()
    gradients = {name: value.grad for name, value in decoder.named_parameters() if value.grad is not None}
    return gradients, sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("kind", ["layer", "selective"])
@pytest.mark.parametrize(
    ("family", "dtype", "lora"),
    [
        ("llama", torch.float32, None),
        ("gemma3_text", torch.bfloat16, None),
        ("gpt_oss", torch.float32, None),
        ("qwen3_moe", torch.float32, None),
        ("qwen3", torch.float32, LoraConfig(rank=3, dropout=0.3)),
    ],
    ids=["llama", "gemma bf16", "gpt_oss", "qwen3_moe", "lora with dropout"],
)
def test_recomputing_changes_no_bit(kind: Kind, family: str, dtype: torch.dtype, lora: LoraConfig | None) -> None:
    """Sinks, experts, windows and dropout too: all gradients are there, and equal."""
    expected, kept = trained(family, "none", dtype, lora)
    found, left = trained(family, kind, dtype, lora)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert left < kept

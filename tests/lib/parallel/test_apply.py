"""How a layer is run changes no gradient: what the backward pass computes again, and whether there is code for it."""

from collections import Counter
from typing import Any, Literal

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils.flop_counter import FlopCounterMode

from lib.config.model import LoraConfig, ModelConfig
from lib.core.errors import ConfigError
from lib.models.decoder import Decoder
from lib.models.lora import put_adapters
from lib.models.verify_configs import random_case
from lib.parallel.apply import prepared_layers, recompute
from lib.parallel.compiled import compile_part
from tests.lib.models.batches import packed

Kind = Literal["none", "layer", "selective"]
ROWS = [[9, 1, 17, 5], [23, 9]]


def trained(
    family: str, kind: Kind, dtype: torch.dtype, lora: LoraConfig | None, *, compiled: bool = False
) -> tuple[dict[str, Any], int]:
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
    for part in (*decoder.layers, decoder.norm) if compiled else ():
        compile_part(part, on_gpu=False)
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


def weight_products(family: str, kind: Kind) -> tuple[int, int]:
    """Operations of products of layers with weights: (forward, forward and backward)."""
    decoder = Decoder(random_case(family, 0, 1).spec)
    prepared_layers(decoder, ModelConfig(activation_checkpointing=kind), on_gpu=False)
    found = []
    with FlopCounterMode(display=False) as counter:
        hidden = decoder(*packed(ROWS, 38, decoder.spec.vocab_size))
        found.append(counter.get_flop_counts()["Global"])
        hidden.square().sum().backward()
        found.append(counter.get_flop_counts()["Global"])
    forward, both = (sum(part[op] for op in (torch.ops.aten.mm, torch.ops.aten.addmm)) for part in map(Counter, found))
    return forward, both


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_what_is_computed_again_is_what_the_configuration_says(family: str) -> None:
    """Nothing; every layer, but perhaps for its last product, whose result nobody needs; all but products with weights. A
    forward pass costs half of its backward pass, where nothing of either is done twice."""
    forward, both = weight_products(family, "none")
    assert forward > 0 and both == 3 * forward
    assert weight_products(family, "selective") == (forward, both)
    again, with_again = weight_products(family, "layer")
    assert again == forward and 0.8 * forward <= with_again - both <= forward


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3"])
def test_compiled_layers_find_the_gradients_of_plain_ones(family: str) -> None:
    """Sinks, windows and experts; layers that are recomputed; and the numbers that dropout draws."""
    lora = LoraConfig(rank=3, dropout=0.3)
    expected, _ = trained(family, "layer", torch.float32, lora)
    torch._dynamo.reset()
    counters.clear()
    found, _ = trained(family, "layer", torch.float32, lora, compiled=True)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("kind", ["none", "layer"])
def test_layers_are_compiled_where_the_configuration_says_so(kind: Literal["none", "layer"]) -> None:
    decoder = Decoder(random_case("llama", 0, 1).spec)
    layers = prepared_layers(decoder, ModelConfig(compile=kind), on_gpu=False)
    assert layers == list(decoder.layers)
    for part in (*layers, decoder.norm):
        assert hasattr(part.forward, "_torchdynamo_orig_callable") == (kind == "layer")


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", _no_compiler)
    layer = Decoder(random_case("llama", 0, 1).spec).layers[0]
    with pytest.raises(ConfigError, match=r"config\.model\.compile is 'layer'.*install g\+\+"):
        compile_part(layer, on_gpu=False)


def _no_compiler() -> str:
    raise InvalidCxxCompiler

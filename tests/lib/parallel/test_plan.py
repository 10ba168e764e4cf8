"""What a model can't be cut into is refused before anything starts; and every parameter of every family has its place."""

import math
from dataclasses import replace
from typing import Any

import pytest

from lib.config.model import ModelConfig
from lib.config.parallel import ParallelConfig
from lib.config.recipes import SftConfig
from lib.core.errors import ConfigError
from lib.models.spec import DecoderSpec, MoeSpec, Rope
from lib.models.weights import parameter_shapes
from lib.parallel.plan import Part, check_plan, part_of

DENSE = DecoderSpec("llama", 97, 48, 64, 2, 4, 2, 12, 64, Rope(1e4), 1e-6, True)
EXPERTS = replace(DENSE, family="qwen3_moe", moe=MoeSpec((0, 1), 12, 2, 20, "softmax"))
MODEL = ModelConfig()


@pytest.mark.parametrize(
    ("parallel", "spec", "message"),
    [
        ({"tensor": 2}, None, "of no family here; leave it out"),
        ({"tensor": 8}, DENSE, "divide the model's 4 attention heads"),
        ({"tensor": 4}, DENSE, "divide the model's 2 key-value heads; choose a divisor"),
        ({"tensor": 2}, replace(DENSE, intermediate_size=33), r"33 features of an MLP \(intermediate_size\)"),
        ({"tensor": 2}, replace(DENSE, moe=MoeSpec((1,), 4, 2, 7, "softmax")), "7 features of an expert"),
        ({"tensor": 3}, replace(DENSE, num_heads=6, num_kv_heads=3, intermediate_size=9), "128 rows of the vocabulary"),
    ],
)
def test_layers_that_cannot_be_cut_are_refused(parallel: dict[str, int], spec: DecoderSpec | None, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.parallel\.tensor is .*{message}"):
        check_plan(ParallelConfig(**parallel), math.prod(parallel.values()), spec=spec, model=MODEL)


def test_layers_of_no_family_are_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"config\.model\.compile .* of no family here"):
        check_plan(ParallelConfig(), 1, spec=None, model=ModelConfig(compile="layer"))


@pytest.mark.parametrize(
    ("parallel", "model", "message"),
    [
        ({"tensor": 2, "expert": 2}, {}, "tensor is 2 and expert is 2, and experts are either dealt out or cut; leave one out"),
        ({"tensor": 2}, {"compile": "layer"}, r"tensor is 2, .* leave out model\.compile, or tensor"),
        ({"tensor": 2}, {"lora": {"dropout": 0.1}}, r"tensor is 2, .*set model\.lora\.dropout to 0"),
        ({"context": 4}, {}, r"context is 4, and a row .* keys and values .*activation_checkpointing"),
    ],
)
def test_what_no_model_can_be_is_no_configuration(parallel: dict[str, int], model: dict[str, Any], message: str) -> None:
    """Before anything is read; one of the two alone is one."""
    with pytest.raises(ConfigError, match=rf"parallel\.{message}"):
        SftConfig.parse({"parallel": parallel, "model": model}, where="config")
    SftConfig.parse({"parallel": {"replicate": 2}, "model": model}, where="config")


def test_layers_that_divide_are_cut() -> None:
    """Experts in every layer leave the size of an MLP that no layer has out of it."""
    for spec in (DENSE, EXPERTS, replace(EXPERTS, intermediate_size=33)):
        check_plan(ParallelConfig(tensor=2, replicate=3), 6, spec=spec, model=MODEL)


@pytest.mark.parametrize(
    ("expert", "num_ranks", "spec", "words"),
    [
        (2, 2, DENSE, r"expert is 2, but the model is a llama model without experts; leave it out"),
        (2, 2, None, r"expert is 2, but the model is of no family here; leave it out"),
        (8, 8, EXPERTS, r"expert is 8, which doesn't divide the model's 12 experts; choose a divisor"),
        (2, 10, EXPERTS, r"expert is 2, which leaves 5 shards of each expert, .* hidden size of 48; choose a larger"),
        (2, 16, EXPERTS, r"expert is 2, which leaves 8 shards of each expert, .* intermediate size of 20; choose a larger"),
    ],
)
def test_experts_that_cannot_be_dealt_out_are_refused(expert: int, num_ranks: int, spec: DecoderSpec, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.parallel\.{words}"):
        check_plan(ParallelConfig(expert=expert), num_ranks, spec=spec, model=MODEL)


@pytest.mark.parametrize(
    ("parallel", "num_ranks"), [({"expert": 12}, 12), ({"expert": 3}, 12), ({"expert": 2, "replicate": 4}, 8)]
)
def test_what_fits_goes_through(parallel: dict[str, int], num_ranks: int) -> None:
    check_plan(ParallelConfig(**parallel), num_ranks, spec=EXPERTS, model=MODEL)


def parts(**changes: Any) -> dict[str, Part]:
    spec = replace(DENSE, **changes)
    return {name: part_of(f"decoder.{name}", spec) for name in parameter_shapes(spec)}


def test_matrices_are_cut_and_only_norms_and_routers_are_not() -> None:
    """[E3] In a model that has everything: what all ranks hold whole are norms, the router, and biases added once."""
    everything = {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "sinks": True, "qk_norm": "head", "norm_order": "both"}
    found = parts(**everything, moe=MoeSpec((1,), 4, 2, 20, "softmax", bias=True), tied=False)
    assert {name for name, part in found.items() if part is Part.SHARED} == {name for name in found if "norm" in name}
    assert {name for name, part in found.items() if part is Part.WHOLE} == {name for name in found if "router" in name}
    assert {name.rpartition("layers.")[2] for name, part in found.items() if part is Part.ONCE} == {
        "0.attn.o.bias",
        "0.mlp.down.bias",
        "1.attn.o.bias",
        "1.mlp.experts.down.bias",
    }
    assert found["embed.weight"] is found["head.weight"] is found["layers.1.mlp.experts.gate.weight"] is Part.OUTPUTS


def test_a_norm_over_all_heads_is_cut_with_them() -> None:
    assert parts(qk_norm="all")["layers.0.attn.q_norm.weight"] is Part.NUMBERS

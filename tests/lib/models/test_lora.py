"""Laws of adapters, for every family: they begin as nothing, are W + scale * B A, and leave all else alone."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call

from lib.config.model import LoraConfig, LoraTarget, ModelConfig
from lib.core.errors import ConfigError
from lib.models.decoder import Decoder
from lib.models.families import FAMILIES
from lib.models.hf_io import read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.experts import Groups
from lib.models.layers.lora import LowRank
from lib.models.lora import (
    adapters,
    chosen_targets,
    initial_factor,
    is_factor,
    merged,
    num_trained,
    put_adapters,
    trained_shapes,
)
from lib.models.spec import DecoderSpec
from tests.lib.models.adapters import all_targets, plain, with_adapters
from tests.lib.models.batches import logits, packed
from tests.lib.models.checkpoints import family_model
from tests.tiny import VOCAB_SIZE

ROWS = [[9, 1, 7], [13, 5]]
KINDS = [*FAMILIES, "llama untied", "qwen3_moe some layers"]
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama untied": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "qwen3_moe some layers": {"num_hidden_layers": 3, "mlp_only_layers": [1], "tie_word_embeddings": False},
    "gemma3_text": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    small = {"hidden_size": 32, "head_dim": 16}
    return {
        kind: family_model(root / str(number), kind.split()[0], dtype="float32", **(small | OVERRIDES.get(kind, {})))
        for number, kind in enumerate(KINDS)
    }


def batch() -> tuple[torch.Tensor, torch.Tensor, DocumentLayout]:
    return packed(ROWS, 20, VOCAB_SIZE)


def effective(decoder: Decoder) -> dict[str, torch.Tensor]:
    """The weights of the plain decoder that an adapted one stands for, differentiable in its factors."""
    weights = {name: tensor for name, tensor in decoder.named_parameters() if not is_factor(name)}
    for name, module in adapters(decoder).items():
        weights[f"{name}.weight"] = module.weight + module.lora.scale * (module.lora.b @ module.lora.a)
    return weights


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_new_adapters_change_no_bit(kind: str, folders: dict[str, Path]) -> None:
    """b is zero; a is not, within 1 / sqrt(inputs)."""
    fresh = with_adapters(folders[kind], random=False)
    assert torch.equal(logits(fresh, *batch()), logits(plain(folders[kind]), *batch()))
    for module in adapters(fresh).values():
        assert not module.lora.b.any()
        assert 0.5 < float(module.lora.a.abs().max()) * math.sqrt(module.weight.shape[-1]) <= 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_decoder_is_the_plain_one_with_other_weights(kind: str, folders: dict[str, Path]) -> None:
    """[D3] Logits and every gradient of the factors are those of autograd through W + scale * B A, written out; and
    logits are those of the merged weights."""
    ours, theirs = with_adapters(folders[kind]), with_adapters(folders[kind])
    reference = plain(folders[kind])
    ids, positions, layout = batch()
    found = logits(ours, ids, positions, layout)
    weights = effective(theirs)
    head = weights["embed.weight" if reference.spec.tied else "head.weight"]
    expected = functional_call(reference, weights, (ids, positions, layout)) @ head.T
    if cap := reference.spec.logit_softcap:
        expected = cap * torch.tanh(expected / cap)
    scale = float(expected.detach().abs().max())
    assert float((found - expected).detach().abs().max()) <= 1e-5 * scale
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)) / scale
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is not None) == is_factor(name), name
        if is_factor(name):
            other = theirs.get_parameter(name).grad
            assert parameter.grad is not None and other is not None
            assert (parameter.grad - other).abs().max() <= 2e-5 * max(float(other.abs().max()), 1e-2), name
    with torch.no_grad():
        state = {name: tensor for name, tensor in ours.named_parameters() if not is_factor(name)}
        for name, module in adapters(ours).items():
            state[f"{name}.weight"] = merged(module.weight, module.lora.a, module.lora.b, module.lora.scale)
        reference.load_state_dict(state, strict=False)
        assert (logits(reference, *batch()) - found).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_alone(kind: str, folders: dict[str, Path]) -> None:
    """[B1] Logits of packed documents are those of each alone; changing one changes no bit of another."""
    decoder = with_adapters(folders[kind])
    ids, positions, layout = batch()
    with torch.no_grad():
        together = logits(decoder, ids, positions, layout)
        for span in layout.spans:
            part = (slice(span.row, span.row + 1), slice(span.start, span.end))
            alone = DocumentLayout.from_document_ids(torch.zeros(1, span.length))
            assert (together[part] - logits(decoder, ids[part], positions[part], alone)).abs().max() <= 1e-5
            inside = torch.zeros_like(ids, dtype=torch.bool)
            inside[part] = True
            after = logits(decoder, torch.where(inside, (ids + 1) % VOCAB_SIZE, ids), positions, layout)
            kept = (layout.document_ids_BT >= 0) & ~inside
            assert torch.equal(together[kept], after[kept])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_nothing_but_padding_has_all_gradients(kind: str, folders: dict[str, Path]) -> None:
    """[B9] Zeros, but there: another rank waits for them."""
    decoder = with_adapters(folders[kind], train_fully=("norms",))
    logits(decoder, *packed([[], []], 8, VOCAB_SIZE)).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def expected_names(spec: DecoderSpec, *, norms: bool = False) -> set[str]:
    """The list of what is trained by default, from the numbers of the spec alone."""
    names = set()
    for layer in range(spec.num_layers):
        modules = [f"attn.{part}" for part in "qkvo"]
        modules += [] if spec.has_experts(layer) else [f"mlp.{part}" for part in ("gate", "up", "down")]
        names |= {f"layers.{layer}.{module}.lora.{factor}" for module in modules for factor in "ab"}
        if norms:
            order = {"pre": ("norm",), "post": ("post_norm",), "both": ("norm", "post_norm")}[spec.norm_order]
            names |= {f"layers.{layer}.{part}_{norm}.weight" for part in ("attn", "mlp") for norm in order}
            names |= {f"layers.{layer}.attn.{part}_norm.weight" for part in "qk" if spec.qk_norm != "none"}
    return names | ({"norm.weight"} if norms else set())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_a_list_that_follows_from_the_spec(kind: str, folders: dict[str, Path]) -> None:
    """[D4] By default, with norms, and with everything that can be named; without LoRA it is every parameter."""
    spec = read_spec(folders[kind])[1]
    assert set(trained_shapes(spec, LoraConfig())) == expected_names(spec)
    assert set(trained_shapes(spec, LoraConfig(train_fully=("norms",)))) == expected_names(spec, norms=True)
    assert list(trained_shapes(spec, None)) == [name for name, _ in plain(folders[kind]).named_parameters()]
    assert num_trained(spec, None) == spec.num_parameters
    most = set(trained_shapes(spec, LoraConfig(targets=all_targets(spec)))) - expected_names(spec)
    expert_layers = spec.moe.layers if spec.moe else ()
    parts = {f"layers.{layer}.mlp.experts.{part}" for layer in expert_layers for part in ("gate", "up", "down")}
    assert most == {
        f"{module}.lora.{factor}" for module in {*parts, "embed", *([] if spec.tied else ["head"])} for factor in "ab"
    }


def test_rows_without_an_id_are_not_counted(tmp_path: Path) -> None:
    """An adapter of a tied embedding of 70 rows, 128 in memory: a [2, 32] and b [70, 2]."""
    spec = replace(read_spec(family_model(tmp_path, "llama", hidden_size=32))[1], vocab_size=70)
    assert num_trained(spec, LoraConfig(rank=2, targets=("embed",))) == 2 * 32 + 70 * 2
    assert num_trained(spec, None) == spec.num_parameters


def test_an_adapter_of_one_expert_changes_that_expert_only(folders: dict[str, Path]) -> None:
    """[D3] Rows of other experts keep every bit; that expert's change."""
    for kind in ("qwen3_moe", "gpt_oss"):
        decoder = with_adapters(folders[kind], targets=("experts",))
        experts = decoder.get_submodule("layers.0.mlp.experts")
        groups = Groups(torch.arange(12).repeat_interleave(2), None, [(e, 2) for e in range(12)])
        x_PD = torch.randn(24, decoder.spec.hidden_size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            before = experts(x_PD, groups)
            for part in ("gate", "up", "down"):
                experts.get_parameter(f"{part}.lora.b")[10] += 0.5
            changed = (experts(x_PD, groups) != before).any(-1).nonzero().flatten().tolist()
        assert changed == [20, 21]


def test_one_product_for_all_experts_is_each_by_itself(folders: dict[str, Path]) -> None:
    """The grouped product, that a GPU runs, on CPU; one expert has no rows."""
    experts = with_adapters(folders["gpt_oss"], rank=8, targets=("experts",)).get_submodule("layers.0.mlp.experts")
    sizes = torch.tensor([3, 0, 4, 1, 5, 2, 1, 1, 2, 2, 1, 2])
    rows = torch.arange(12).repeat_interleave(sizes)
    x_PD = torch.randn(24, 32, generator=torch.Generator().manual_seed(2))
    found = []
    for groups in (
        Groups(rows, sizes.cumsum(0).to(torch.int32), []),
        Groups(rows, None, [(e, size) for e, size in enumerate(sizes.tolist()) if size]),
    ):
        experts.zero_grad()
        output = experts(x_PD, groups)
        (output * torch.linspace(-1, 1, 32)).sum().backward()
        found.append(
            [output.detach(), *(experts.get_parameter(f"{part}.lora.{f}").grad for part in ("up", "down") for f in "ab")]
        )
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and (one - other).abs().max() <= 1e-4 * max(1.0, float(other.abs().max()))


def test_dropout_is_on_in_training_only_and_repeats_with_the_generator(folders: dict[str, Path]) -> None:
    """[D4] Evaluation is as without dropout; training draws from torch's generator, and keeps the mean."""
    for kind in ("llama", "qwen3_moe"):
        decoder, without = (with_adapters(folders[kind], dropout=rate) for rate in (0.5, 0.0))
        with torch.no_grad():
            torch.manual_seed(5)
            first, second = logits(decoder, *batch()), logits(decoder, *batch())
            torch.manual_seed(5)
            assert torch.equal(logits(decoder, *batch()), first) and not torch.equal(first, second)
            assert torch.equal(logits(decoder.eval(), *batch()), logits(without, *batch()))
    lora = LowRank(torch.zeros(4, 4), LoraConfig(rank=1, dropout=0.25))
    dropped = lora.drop(torch.ones(4000))
    assert set(dropped.tolist()) == {0.0, float(torch.tensor(4 / 3))}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.05)


@given(rank=st.integers(1, 64), alpha=st.floats(0.5, 64.0), rslora=st.booleans())
def test_the_scale_is_that_of_the_papers(rank: int, alpha: float, rslora: bool) -> None:
    assert LoraConfig(rank=rank, alpha=alpha, rslora=rslora).scale == alpha / (math.sqrt(rank) if rslora else rank)


def test_first_values_follow_from_name_and_seed_alone() -> None:
    one = initial_factor("layers.0.attn.q.lora.a", (4, 9), 1)
    assert torch.equal(one, initial_factor("layers.0.attn.q.lora.a", (4, 9), 1))
    assert not torch.equal(one, initial_factor("layers.0.attn.q.lora.a", (4, 9), 2))
    assert not torch.equal(one, initial_factor("layers.1.attn.q.lora.a", (4, 9), 1))


@pytest.mark.parametrize(
    ("kind", "fields", "problem"),
    [
        ("llama", {"targets": ("experts",)}, r"targets: this llama model has no 'experts'; it has q, k, v, o, gate, up, down"),
        ("gpt_oss", {"targets": ("gate",)}, r"targets: this gpt_oss model has no 'gate'; it has q, k, v, o, experts, embed"),
        ("llama", {"targets": ("head",)}, r"has no 'head'.*its head is its embedding: name 'embed'"),
        ("qwen3", {"train_fully": ("router",)}, r"train_fully: this qwen3 model has no 'router'; it has norms, embed"),
    ],
)
def test_what_a_model_does_not_have_is_refused(
    kind: str, fields: dict[str, Any], problem: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=problem):
        chosen_targets(LoraConfig(**fields), read_spec(folders[kind])[1])
    with pytest.raises(ConfigError, match=problem):
        put_adapters(plain(folders[kind]), LoraConfig(**fields))


@pytest.mark.parametrize(
    ("lora", "problem"),
    [
        ({"rank": 0}, r"lora.rank: .*greater than or equal to 1; found 0"),
        ({"alpha": 0}, r"lora.alpha: .*greater than 0"),
        ({"dropout": 1.0}, r"lora.dropout: .*less than 1"),
        ({"targets": ["q_proj"]}, r"lora.targets.0: .*'q', 'k', 'v', 'o', 'gate', 'up', 'down', 'experts', 'embed' or 'head'"),
        ({"train_fully": ["bias"]}, r"lora.train_fully.0: .*'norms', 'router', 'embed' or 'head'"),
        ({"targets": []}, r"nothing would be trained"),
        ({"targets": ["q", "q"]}, r"'q' is named twice"),
        ({"targets": ["embed"], "train_fully": ["embed"]}, r"'embed' is in targets and in train_fully"),
        ({"r": 4}, r"lora.r: .*no such key"),
    ],
)
def test_wrong_settings_are_refused_where_they_stand(lora: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ModelConfig.parse({"lora": lora}, where="test")


def test_a_target_is_one_of_the_unified_names(folders: dict[str, Path]) -> None:
    """Each target alone adapts its modules in every layer, and only those."""
    spec = read_spec(folders["qwen3_moe some layers"])[1]
    layers: dict[LoraTarget, int] = {
        "q": 3,
        "k": 3,
        "v": 3,
        "o": 3,
        "gate": 1,
        "up": 1,
        "down": 1,
        "experts": 6,
        "embed": 1,
        "head": 1,
    }
    for target, count in layers.items():
        assert len(trained_shapes(spec, LoraConfig(targets=(target,)))) == 2 * count


def test_a_merged_weight_is_rounded_once() -> None:
    """[D1] Of 4,096 bfloat16 weights: W + scale * B A in float64, rounded to bfloat16, is what is stored of the merge but for
    ties of float32; the product rounded before the sum would differ in many."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator).bfloat16()
    a, b = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
    product = 0.37 * (b.double() @ a.double())
    exact = (weight.double() + product).bfloat16()
    assert int((merged(weight, a, b, 0.37).bfloat16() != exact).sum()) <= 2
    assert int(((weight + product.bfloat16()) != exact).sum()) > 200

"""Experts: nothing is dropped, padding doesn't count, the losses are their definitions, the bias is state."""

from pathlib import Path

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lib.config.optim import OptimConfig
from lib.core.errors import ModelError
from lib.models.decoder import Decoder
from lib.models.hf_io import load_full, read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.experts import Groups
from lib.models.layers.moe import Moe, RouterLoad, balance_experts, load_balancing_loss, router_z_loss
from lib.models.spec import DecoderSpec, Gate, MoeSpec, Rope
from lib.parallel.load import full_tensors
from lib.train.optim import build_optimizer
from lib.train.state import ModelAndOptimizer
from tests.lib.models.batches import packed
from tests.lib.models.checkpoints import family_model
from tests.tiny import VOCAB_SIZE

D, E, C = 16, 6, 2
ROWS = [[9, 1, 17, 5], [23, 9]]


def layer(*, bias: bool = False, weights: str = "softmax") -> Moe:
    """A layer with random weights everywhere."""
    moe = MoeSpec((0,), E, C, 12, weights, bias)  # type: ignore[arg-type]
    gate = Gate("clamped", 1.7, 1.0) if bias else Gate("silu")
    spec = DecoderSpec("llama", 8, D, 8, 1, 2, 2, 8, 64, Rope(1e4), 1e-6, True, gate=gate, moe=moe)
    built, generator = Moe(spec, moe), torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return built


def inputs(layout: DocumentLayout) -> torch.Tensor:
    return torch.randn(*layout.document_ids_BT.shape, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_token_goes_through_its_experts(bias: bool, balanced: bool) -> None:
    """Against a loop over tokens and all experts in float64: top_k of them, weighted by their probability; zero on padding.
    What balances their load decides which are taken, and not how much each counts [E2]."""
    moe = layer(bias=bias)
    if balanced:
        moe.expert_bias.copy_(torch.linspace(-0.3, 0.3, E))
    _, _, layout = packed(ROWS, 34, 10)
    x_BTD = inputs(layout)
    found, load = moe(x_BTD, layout)
    dense = layer(bias=bias).double()
    for row, column in (layout.document_ids_BT >= 0).nonzero().tolist():
        x_D = x_BTD[row, column].double()
        probabilities_E = dense.router(x_D).softmax(-1)
        expected = torch.zeros(D, dtype=torch.float64)
        for e in (probabilities_E + moe.expert_bias).topk(C).indices.tolist():
            halves = (dense.experts.gate, dense.experts.up)
            gate, up = (part.weight[e] @ x_D + (part.bias[e] if bias else 0.0) for part in halves)
            if bias:
                gate, up = gate.clamp(max=1.0), up.clamp(-1.0, 1.0) + 1
            hidden = gate * torch.sigmoid((1.7 if bias else 1.0) * gate) * up
            down = dense.experts.down
            expected += probabilities_E[e] * (down.weight[e] @ hidden + (down.bias[e] if bias else 0.0))
        assert (found[row, column] - expected).abs().max() <= 1e-5
    assert (found[layout.document_ids_BT < 0] == 0).all()
    assert int(load.num_tokens) == 64 and int(load.tokens_E.sum()) == 64 * C


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_for_all_experts_is_each_by_itself(bias: bool) -> None:
    """The grouped product, that a GPU runs, on CPU: output and gradients. One expert has no rows."""
    sizes = [3, 0, 4, 1, 5, 2]
    experts = torch.arange(E).repeat_interleave(torch.tensor(sizes))
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    x_PD = torch.randn(15, D, generator=torch.Generator().manual_seed(2))
    results = []
    for groups in (Groups(experts, ends, []), Groups(experts, None, [(e, size) for e, size in enumerate(sizes) if size])):
        moe = layer(bias=bias)
        x = x_PD.clone().requires_grad_()
        output = moe.experts(x, groups)
        (output * torch.linspace(-1, 1, D)).sum().backward()
        results.append([output, x.grad, *(parameter.grad for parameter in moe.experts.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None and (ours - theirs).abs().max() <= 1e-5


def test_the_loss_is_that_of_transformers_on_real_tokens_only() -> None:
    """[E1] One layer, where pooling over layers makes no difference; padding in the middle of nowhere changes nothing."""
    moe = layer()
    _, _, layout = packed(ROWS, 34, 10)
    x_BTD = inputs(layout)
    _, load = moe(x_BTD, layout)
    is_real = (layout.document_ids_BT >= 0).flatten()
    logits = moe.router(x_BTD).flatten(0, 1)
    theirs = load_balancing_loss_func((logits[is_real],), E, C)
    assert torch.allclose(load_balancing_loss([load]), theirs, atol=1e-6)
    assert torch.allclose(router_z_loss([load]), logits[is_real].logsumexp(-1).square().mean(), atol=1e-6)


def test_the_loss_does_not_depend_on_padding_or_packing() -> None:
    """[E1] The same documents in two rows or one, with no padding or much: the same losses and gradients to 1e-6."""
    moe = layer()
    documents = torch.randn(64, D, generator=torch.Generator().manual_seed(3))
    losses, gradients = [], []
    for rows, columns in (([[9, 1, 17, 5], [23, 9]], 32), ([[9, 1, 17, 5, 23, 9]], 64), ([[9, 1], [17, 5], [23, 9], []], 50)):
        _, _, layout = packed(rows, columns, 10)
        x_BTD = torch.full((len(rows), columns, D), 7.0)
        x_BTD[layout.document_ids_BT >= 0] = documents
        _, load = moe(x_BTD, layout)
        loss = load_balancing_loss([load]) + router_z_loss([load])
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, moe.router.weight)[0])
    assert all(abs(float((loss - losses[0]).detach())) <= 1e-6 for loss in losses)
    assert all((gradient - gradients[0]).abs().max() <= 1e-6 for gradient in gradients) and gradients[0].any()


def test_each_layer_is_balanced_by_itself() -> None:
    """[E1] Two layers that each send all to one expert, another one each: the loss is E, not the E / 2 of pooled layers."""
    zero = torch.zeros(())
    crowded = [
        RouterLoad(torch.tensor(10), torch.eye(4, dtype=torch.int64)[e] * 10, torch.eye(4)[e] * 10, zero) for e in (0, 1)
    ]
    assert float(load_balancing_loss(crowded)) == pytest.approx(4.0)
    even = RouterLoad(torch.tensor(10), torch.full((4,), 5), torch.full((4,), 2.5), zero)
    assert float(load_balancing_loss([even])) == pytest.approx(2.0), "top_k where all is even"


def test_the_load_reaches_the_caller_for_each_layer(tmp_path: Path) -> None:
    decoder = decoder_of(family_model(tmp_path, "qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1]))
    loads: list[RouterLoad] = []
    token_ids, positions, layout = packed(ROWS, 34, VOCAB_SIZE)
    decoder(token_ids, positions, layout, loads)
    assert len(loads) == 2 and all(int(load.tokens_E.sum()) == 64 * 2 for load in loads)
    load_balancing_loss(loads).backward()
    router = decoder.get_parameter("layers.0.mlp.router.weight")
    assert router.grad is not None and router.grad.any()


def test_the_bias_evens_the_load_and_leaves_the_weights_alone() -> None:
    """A layer whose router prefers one expert: the bias takes tokens away from it, step by step."""
    moe = layer()
    moe.router.weight.data[0] += 0.2
    _, _, layout = packed(ROWS, 34, 10)
    x_BTD = inputs(layout).abs()
    bias, spreads = moe.expert_bias, []
    for _ in range(100):
        _, load = moe(x_BTD, layout)
        spreads.append(int(load.tokens_E.max() - load.tokens_E.min()))
        balance_experts(moe, load.tokens_E, rate=0.02)
    assert moe.expert_bias is bias and bias.any(), "[E2] changed in place"
    assert spreads[0] > 40 and spreads[-1] <= spreads[0] // 2, spreads


def test_the_bias_is_in_the_checkpoint_and_not_in_an_export(tmp_path: Path) -> None:
    """[E2] Saved and loaded to the bit after steps; a Hugging Face folder has no place for it, which is said."""
    folder = family_model(tmp_path, "qwen3_moe")
    decoder, other = decoder_of(folder), decoder_of(folder)
    optimizer = build_optimizer(decoder, OptimConfig())
    token_ids, positions, layout = packed(ROWS, 34, VOCAB_SIZE)
    for _ in range(3):
        loads: list[RouterLoad] = []
        decoder(token_ids, positions, layout, loads)
        for moe, load in zip((part for part in decoder.modules() if isinstance(part, Moe)), loads):
            balance_experts(moe, load.tokens_E, rate=0.001)
    saved = ModelAndOptimizer(decoder, optimizer)
    pieces = saved.pieces()
    names = [name for name in pieces if name.startswith("buffer/")]
    assert names == [f"buffer/layers.{i}.mlp.expert_bias" for i in range(2)] and all(pieces[name].local.any() for name in names)
    restored = ModelAndOptimizer(other, build_optimizer(other, OptimConfig()))
    restored.load(lambda name, offset, shape: pieces[name].local.clone(), saved.values())
    assert all(torch.equal(restored.pieces()[name].local, pieces[name].local) for name in names)
    with pytest.raises(ModelError, match=r"expert_bias is not zero, and a qwen3_moe checkpoint has no place"):
        list(full_tensors(decoder))


def decoder_of(folder: Path) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    decoder.requires_grad_(True)
    return decoder

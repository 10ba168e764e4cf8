"""Laws of the optimizer and its schedule."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib.config.optim import OptimConfig
from lib.train.optim import build_optimizer, learning_rate_at, set_learning_rate


@given(steps=st.integers(1, 300), warmup=st.integers(0, 299), peak=st.floats(1e-8, 1.0), final=st.floats(0.0, 1.0))
def test_learning_rate_is_its_closed_form(steps: int, warmup: int, peak: float, final: float) -> None:
    """[F6] Rises to the peak at the end of warm-up, ends at its final fraction, is positive on step 1, never jumps up."""
    warmup = min(warmup, steps - 1)
    config = OptimConfig(warmup_steps=warmup, final_fraction=final)
    rates = [learning_rate_at(step, steps=steps, peak=peak, config=config) for step in range(1, steps + 1)]
    peak_step = max(warmup, 1)
    assert rates[0] > 0.0 and rates[peak_step - 1] == pytest.approx(peak, rel=1e-12)
    assert all(after >= before for before, after in pairwise(rates[:peak_step]))
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(rates[peak_step - 1 :]))
    if steps > peak_step:
        assert rates[-1] == pytest.approx(peak * final, rel=1e-9, abs=1e-18)


def test_learning_rate_worked_out_by_hand() -> None:
    """Peak 1, 2 warm-up steps of 6, final 0.2: 1/2, 1, then 0.2 + 0.8 * (1 + cos(pi * k / 4)) / 2 for k = 1..4."""
    config = OptimConfig(warmup_steps=2, final_fraction=0.2)
    found = [learning_rate_at(step, steps=6, peak=1.0, config=config) for step in range(1, 7)]
    root = math.sqrt(0.5)
    assert found == pytest.approx([0.5, 1.0, 0.2 + 0.4 * (1 + root), 0.6, 0.2 + 0.4 * (1 - root), 0.2], abs=1e-12)


@pytest.mark.parametrize("step", [0, 7])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=r"outside 1\.\.6"):
        learning_rate_at(step, steps=6, peak=1.0, config=OptimConfig())


def test_decay_is_on_matrices_only() -> None:
    """With a zero gradient AdamW multiplies a decayed weight by 1 - lr * decay = 1 - 0.1 * 0.5 and leaves others alone, the
    biases of experts, too, which lie under each other as a matrix does."""
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.ModuleDict({"experts": nn.Module()}))
    module[2]["experts"].register_parameter("bias", nn.Parameter(torch.randn(4, 3)))
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    optimizer = build_optimizer(module, OptimConfig(weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in module.named_parameters():
        expected = before[name] * 0.95 if name == "0.weight" else before[name]
        assert torch.allclose(value, expected, rtol=0, atol=1e-7), name


def test_frozen_weights_have_no_part() -> None:
    """[D4] They are not the optimizer's, which would decay them and demand float32 of them; stored in bfloat16 they stay so."""
    module = nn.Sequential(nn.Linear(3, 3).bfloat16().requires_grad_(False), nn.Linear(3, 3))
    optimizer = build_optimizer(module, OptimConfig(weight_decay=0.5))
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert given == {id(parameter) for parameter in module[1].parameters()}


def test_low_precision_weights_are_refused() -> None:
    """[C7] An update of lr 1e-6 is below bfloat16's spacing: the optimizer takes float32 weights only."""
    with pytest.raises(ValueError, match="must be float32"):
        build_optimizer(nn.Linear(2, 2).bfloat16(), OptimConfig())


def test_small_updates_are_not_lost() -> None:
    """[C7] 50 steps at lr 1e-6 move float32 masters >= 0.99 of float64's way, though the forward pass is bfloat16."""
    torch.manual_seed(0)
    moves = {}
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        weight = nn.Parameter((torch.randn(64, 64) * 0.05).to(dtype))
        start = weight.detach().clone()
        optimizer = (
            build_optimizer(nn.ParameterList([weight]), OptimConfig())
            if dtype == torch.float32
            else torch.optim.AdamW([weight], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        )
        set_learning_rate(optimizer, 1e-6)
        inputs = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
        for _ in range(50):
            optimizer.zero_grad()
            (inputs.bfloat16() @ weight.bfloat16()).float().square().mean().backward()
            optimizer.step()
        moves[dtype] = (weight.detach() - start).double()
    assert moves[torch.float32].norm() >= 0.99 * moves[torch.float64].norm() > 0

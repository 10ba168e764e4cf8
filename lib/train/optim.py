"""AdamW on float32 master weights, and the learning rate as a function of the step alone."""

import math

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lib.config.optim import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over all trainable parameters; weight decay on matrices, none on vectors (norms, biases).

    Raises:
        ValueError: a parameter isn't float32; updates far below a low-precision weight's spacing would be lost.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    for name, parameter in named:
        if parameter.dtype != torch.float32:
            raise ValueError(f"parameter {name} is {parameter.dtype}; the optimizer's weights must be float32")
    # One fused update takes parameters of one mesh; those of experts may be on another than the rest.
    groups: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = {}
    for name, parameter in named:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        is_matrix = parameter.ndim >= 2 and not name.endswith(".bias")  # experts have theirs under each other
        groups.setdefault((is_matrix, mesh), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if is_matrix else 0.0}
            for (is_matrix, _), parameters in groups.items()
        ],
        lr=0.0,  # set before every step
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
        foreach=False,
    )


def learning_rate_at(step: int, *, steps: int, peak: float, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step`, the first being 1 and the last `steps`.

    Rises linearly to `peak`, which step `warmup_steps` has (the first step, without warm-up), then falls along a cosine
    to `peak * final_fraction`, which the last step has. Never 0 on the first step.
    """
    if not 1 <= step <= steps:
        raise ValueError(f"step {step} is outside 1..{steps}")
    peak_step = max(config.warmup_steps, 1)
    if step <= peak_step:
        return peak * step / peak_step
    progress = (step - peak_step) / (steps - peak_step)
    return peak * (config.final_fraction + (1.0 - config.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate

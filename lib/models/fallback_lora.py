"""Adapters beside the linear layers of a model that transformers computes, and the proof that they do what merging them does.

All its linear layers get one but the output head. Letters: I inputs, O outputs, R rank.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lib.config.model import LoraConfig
from lib.core.errors import ConfigError
from lib.models.hf_fallback import FallbackModel, load_fallback
from lib.models.layers.lora import AdaptedLinear, LowRank
from lib.models.logit_report import LOGIT_LIMIT
from lib.models.lora import initial_factor, is_factor, merged
from lib.models.peft_export import CONFIG_FILE, PREFIX, WEIGHTS_FILE, peft_settings


class AdaptedConv1D(Conv1D):  # type: ignore[misc]  # transformers has no types
    """GPT-2's linear layer, whose weight is [I, O], and its adapter."""

    def __init__(self, plain: Conv1D, config: LoraConfig) -> None:
        super().__init__(plain.nf, plain.nx)
        self.weight, self.bias = plain.weight, plain.bias
        self.lora = LowRank(plain.weight.T, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(x) + self.lora(x)
        return output


def put_fallback_adapters(model: FallbackModel, config: LoraConfig, *, seed: int) -> None:
    """Freeze a model (it may be on the meta device) and give its linear layers adapters in place, each a function of the seed
    and its own name.

    Raises:
        ConfigError: the configuration names parts, which only families have names for; or there is no linear layer.
    """
    if config.targets is not None or config.train_fully:
        raise ConfigError(
            "config.model.lora: targets and train_fully name parts of the families, and the model is of none; leave them out: "
            "all its linear layers but the output head get adapters"
        )
    layers = linear_layers(model)
    if not layers:
        raise ConfigError("config.model.lora is set, but the model has no linear layer; leave it out to train all weights")
    model.requires_grad_(False)
    for name, plain in layers.items():
        parent, _, leaf = name.rpartition(".")
        layer = AdaptedConv1D(plain, config) if isinstance(plain, Conv1D) else AdaptedLinear(plain, config)
        setattr(model.model.get_submodule(parent), leaf, layer)
    for name, parameter in model.model.named_parameters():
        if is_factor(name) and not parameter.is_meta:
            parameter.data.copy_(initial_factor(name, tuple(parameter.shape), seed))


def linear_layers(model: FallbackModel) -> dict[str, nn.Linear | Conv1D]:
    """Name in transformers' model -> layer that an adapter is for, or that has one."""
    head = model.model.get_output_embeddings()
    kinds = (nn.Linear, Conv1D, AdaptedLinear, AdaptedConv1D)
    return {name: part for name, part in model.model.named_modules() if type(part) in kinds and part is not head}


def merged_weight(layer: nn.Module, weight: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    """An adapted layer's weight with the adapter in it, as the plain layer has it; of whole tensors."""
    scale = layer.get_submodule("lora").scale
    assert isinstance(scale, float)
    return merged(weight.T, a_RI, b_OR, scale).T if isinstance(layer, AdaptedConv1D) else merged(weight, a_RI, b_OR, scale)


@torch.no_grad()
def adapter_problem(folder: Path, seed: int = 0) -> str:
    """Why adapters can't be trained beside a folder's model; empty where random ones give the logits of the merged weights."""
    model, config = load_fallback(folder), LoraConfig(rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.spec.vocab_size, (1, 24), generator=generator)
    plain = model.model(input_ids=ids, use_cache=False).logits
    try:
        put_fallback_adapters(model, config, seed=seed)
    except ConfigError as error:
        return str(error)
    layers = [part for part in linear_layers(model).values() if isinstance(part, AdaptedLinear | AdaptedConv1D)]
    for layer in layers:
        layer.lora.b.normal_(std=layer.lora.b.shape[0] ** -0.5, generator=generator)
    adapted = model.model(input_ids=ids, use_cache=False).logits
    for layer in layers:
        layer.weight.data = merged_weight(layer, layer.weight, layer.lora.a, layer.lora.b)
        layer.lora.b.zero_()
    expected = model.model(input_ids=ids, use_cache=False).logits
    size = float(expected.abs().max())
    difference, effect = float((adapted - expected).abs().max()) / size, float((expected - plain).abs().max()) / size
    if difference <= LOGIT_LIMIT < effect:
        return ""
    return f"logits of adapters and of merged weights differ by {difference:.3g}, those with and without by {effect:.3g}"


def write_fallback_adapter(out: Path, tensors: Iterable[tuple[str, torch.Tensor]], config: LoraConfig) -> None:
    """Write adapters as PEFT loads them, in float32.

    Args:
        out: an existing empty folder.
        tensors: (name in transformers' model, whole tensor) of every factor.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        layer, _, factor = name.rpartition(".lora.")
        stored[f"{PREFIX}{layer}.lora_{factor.upper()}.weight"] = tensor.detach().float().cpu().contiguous()
    modules = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in stored})
    settings = peft_settings(config) | {"target_modules": modules}
    save_file(stored, out / WEIGHTS_FILE)
    (out / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

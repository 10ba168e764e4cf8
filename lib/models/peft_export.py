"""Adapters as a folder that `peft` and vLLM load: adapter_config.json and adapter_model.safetensors.

PEFT names a factor by the module of transformers that it stands beside. Where transformers holds several matrices of ours in
one parameter (gate and up of gpt-oss's experts), the adapter of the parameter is the two of ours side by side, of twice the
rank and the same scale. Letters: E experts, R rank, I inputs, O outputs.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lib.config.model import LoraConfig
from lib.models.families import family_of_spec
from lib.models.lora import chosen_targets, is_factor
from lib.models.spec import DecoderSpec
from lib.models.weights import VOCABULARY_WEIGHTS, Entry, WeightMap

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_HEAD = "lm_head"


def why_not_peft(config: LoraConfig, spec: DecoderSpec) -> str | None:
    """Why these adapters can't be given to PEFT, or None if they can."""
    targets = chosen_targets(config, spec)
    dense = [target for target in ("gate", "up", "down") if target in targets]
    if dense and spec.moe is not None:
        return (
            f"in a {spec.family} model PEFT takes targets {dense} for its experts, not for the MLPs of the layers without "
            "experts; the merged weights hold everything"
        )
    return None


def write_adapter(out: Path, tensors: Iterable[tuple[str, torch.Tensor]], config: LoraConfig, spec: DecoderSpec) -> None:
    """Write a decoder's adapters, and what was trained beside them, in float32.

    Args:
        out: an existing empty folder.
        tensors: (our name, whole tensor) of everything that was trained.
    """
    assert why_not_peft(config, spec) is None
    weights = family_of_spec(spec).weight_map(spec)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if is_factor(name):
            layer, _, factor = name.rpartition(".")
            layer = layer.removesuffix(".lora")
            rows = spec.vocab_size if factor == "b" and f"{layer}.weight" in VOCABULARY_WEIGHTS else None
            factors.setdefault(layer, {})[factor] = tensor.detach().cpu()[:rows]
        else:
            rows = spec.vocab_size if name in VOCABULARY_WEIGHTS else None
            whole |= dict(_whole(name, tensor.detach().cpu()[:rows], weights, tied=spec.tied))
    stored = dict(_factors(factors, weights, tied=spec.tied))
    modules = sorted({_module(name) for name in stored if ".mlp.experts.lora" not in name and ".base_layer." not in name})
    parameters = sorted({parameter for layer in factors if (parameter := _parameter(weights.entries[f"{layer}.weight"]))})
    settings = peft_settings(config, has_experts="experts" in chosen_targets(config, spec)) | {
        "target_modules": modules,
        "target_parameters": parameters or None,
        "modules_to_save": sorted({name.rsplit(".", 2)[-2] for name in whole}) or None,
        "rank_pattern": {name: 2 * config.rank for name in parameters if name.endswith("gate_up_proj")},
        "alpha_pattern": {name: 2 * config.rank * config.scale for name in parameters if name.endswith("gate_up_proj")},
    }
    save_file({f"{PREFIX}{name}": tensor.contiguous() for name, tensor in (stored | whole).items()}, out / WEIGHTS_FILE)
    (out / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def peft_settings(config: LoraConfig, *, has_experts: bool = False) -> dict[str, Any]:
    """What adapter_config.json says of all adapters. PEFT changes the rank of experts' adapters while it loads them, and has no
    dropout for them: they come with a scale that needs no rank, and without dropout."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": config.rank,
        "lora_alpha": config.scale * config.rank if has_experts else config.alpha,
        "use_rslora": config.rslora and not has_experts,
        "lora_dropout": 0.0 if has_experts else config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _whole(name: str, tensor: torch.Tensor, weights: WeightMap, *, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    (stored,) = weights.entries[name].names
    yield stored, tensor
    if tied and name == "embed.weight":
        yield f"{_HEAD}.weight", tensor.clone()


def _factors(
    factors: dict[str, dict[str, torch.Tensor]], weights: WeightMap, *, tied: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name without its prefix, factor) of every module that PEFT adapts."""
    for layer, pair in factors.items():
        a, b, entry = pair["a"], pair["b"], weights.entries[f"{layer}.weight"]
        modules = [name.removesuffix(".weight") for name in entry.names]
        if layer == "embed":
            yield f"{modules[0]}.lora_embedding_A", b.T
            yield f"{modules[0]}.lora_embedding_B", a.T
            modules = [_HEAD] if tied else []
        if entry.stacked:
            yield from _linear_factors(modules, a.unbind(), b.unbind())
        elif not _parameter(entry):
            yield from _linear_factors(modules, [a.clone()], [b.clone()])
        elif entry.num_parts == 1:
            yield from _parameter_factors(f"{modules[0].rpartition('.')[0]}", a, b)
        elif entry.part == 0:
            up = factors[f"{layer.removesuffix('.gate')}.up"]
            yield from _parameter_factors(f"{modules[0].rpartition('.')[0]}.base_layer", *_side_by_side(a, b, up["a"], up["b"]))


def _linear_factors(
    modules: Iterable[str], a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    for module, a_RI, b_OR in zip(modules, a, b):
        yield f"{module}.lora_A.weight", a_RI
        yield f"{module}.lora_B.weight", b_OR


def _parameter_factors(module: str, a_ERI: torch.Tensor, b_EOR: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """All experts in two matrices: A expert after expert, B with the experts of a rank side by side."""
    yield f"{module}.lora_A.weight", a_ERI.flatten(0, 1)
    yield f"{module}.lora_B.weight", b_EOR.permute(1, 2, 0).flatten(1)


def _side_by_side(
    gate_a_ERI: torch.Tensor, gate_b_EOR: torch.Tensor, up_a_ERI: torch.Tensor, up_b_EOR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of a parameter whose outputs are gate and up in turn."""
    num_experts, num_outputs, rank = gate_b_EOR.shape
    b = torch.zeros(num_experts, num_outputs, 2, 2 * rank)
    b[:, :, 0, :rank], b[:, :, 1, rank:] = gate_b_EOR, up_b_EOR
    return torch.cat([gate_a_ERI, up_a_ERI], dim=1), b.flatten(1, 2)


def _parameter(entry: Entry) -> str | None:
    """The end of the name of a parameter that transformers holds for all experts, in checkpoints too."""
    name = entry.names[0]
    return None if entry.stacked or name.endswith(".weight") else ".".join(name.split(".")[-2:])


def _module(name: str) -> str:
    """Last part of the name of the module that a factor belongs to."""
    parts = [part for part in name.split(".") if part != "weight" and not part.startswith("lora_")]
    return parts[-1]

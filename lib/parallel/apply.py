"""Parallelism put on from outside, by module name, for all families: cut, recompute, compile, shard."""

import re
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from lib.config.model import ModelConfig
from lib.core.errors import ConfigError
from lib.models.layers.experts import Experts
from lib.parallel.compiled import compile_part
from lib.parallel.experts import EXPERTS_NAME, deal_experts, inner_shards
from lib.parallel.mesh import EXPERT_AXIS, SHARD_AXIS, expert_sharding_mesh, sharding_mesh
from lib.parallel.shared_memory import HostMemory, SharedAllGather, SharedReduceScatter
from lib.parallel.tensor import cut_layers

WEIGHT_PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._grouped_mm.default]
"""Products of linear layers and of grouped experts; those of attention are others."""
LAYER_NAME = re.compile(r"(?:.*\.)?layers\.\d+")
"""Modules that are sharded, gathered and recomputed as units; all else belongs to the root."""
FINAL_NORM_NAME = re.compile(r"(?:.*\.)?norm")


def shard_model(module: nn.Module, mesh: DeviceMesh, config: ModelConfig) -> None:
    """Cut and shard a module in place (it may be on the meta device); forward and backward then run on all ranks together.

    Parameters stay float32 pieces and are gathered in the compute dtype. Gradients are summed over the ranks in float32 (in
    the compute dtype where that is wider), never averaged: the loss is a sum and is divided once, by the global count. Inputs
    are not cast: the rotary tables are float32 in every compute dtype.

    Raises:
        ConfigError: layers shall be recomputed, and no module is named as one.
    """
    cut_layers(module, mesh)
    layers = prepared_layers(module, config, on_gpu=mesh.device_type == "cuda")
    dtype = getattr(torch, config.compute_dtype)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.promote_types(dtype, torch.float32), cast_forward_inputs=False
    )
    on_gpu, dealt = mesh.device_type == "cuda", _dealt_experts(module, mesh)
    shard = partial(fully_shard, mp_policy=policy, reshard_after_forward=on_gpu)
    for experts in dealt:
        deal_experts(experts, mesh[EXPERT_AXIS])
        held_by = expert_sharding_mesh(mesh)
        shard(experts, mesh=held_by, shard_placement_fn=inner_shards(held_by[SHARD_AXIS].size()))
    for layer in layers:
        shard(layer, mesh=sharding_mesh(mesh))
    shard(module, mesh=sharding_mesh(mesh), reshard_after_forward=False)
    memory_of = {} if on_gpu else {False: _host_memory(sharding_mesh(mesh))}
    if dealt and not on_gpu:
        memory_of[True] = _host_memory(expert_sharding_mesh(mesh))
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            if memory := memory_of.get(isinstance(part, Experts)):
                part.set_custom_all_gather(SharedAllGather(memory))
                part.set_custom_reduce_scatter(SharedReduceScatter(memory))


def prepared_layers(module: nn.Module, config: ModelConfig, *, on_gpu: bool) -> list[nn.Module]:
    """The layers, which recompute and are compiled as configured; so is the norm behind them."""
    layers = [layer for name, layer in module.named_modules() if LAYER_NAME.fullmatch(name)]
    if not layers and config.activation_checkpointing != "none":
        raise ConfigError(
            f"config.model.activation_checkpointing is {config.activation_checkpointing!r}, but no module of this model is "
            "named layers.<number>, so there is nothing to recompute; leave it out"
        )
    for layer in layers:
        recompute(layer, config.activation_checkpointing)
    if config.compile == "layer":
        for part in (*layers, *(part for name, part in module.named_modules() if FINAL_NORM_NAME.fullmatch(name))):
            compile_part(part, on_gpu=on_gpu)
    return layers


def recompute(layer: nn.Module, kind: Literal["none", "layer", "selective"]) -> None:
    """Let the backward pass compute a layer again, in place: all of it, or all but its products with weights."""
    if kind == "layer":
        checkpoint(layer)
    elif kind == "selective":
        checkpoint(layer, context_fn=partial(create_selective_checkpoint_contexts, WEIGHT_PRODUCTS))


def _dealt_experts(module: nn.Module, mesh: DeviceMesh) -> list[Experts]:
    """Those that the ranks of the expert axis hold different ones of, where there is such an axis."""
    if EXPERT_AXIS not in (mesh.mesh_dim_names or ()):
        return []
    return [part for name, part in module.named_modules() if isinstance(part, Experts) and EXPERTS_NAME.fullmatch(name)]


def _host_memory(mesh: DeviceMesh) -> HostMemory | None:
    """Of the ranks that hold different pieces: those of the last axis."""
    group = mesh.get_group(mesh.ndim - 1)
    return HostMemory.open(group) if dist.get_world_size(group) > 1 else None

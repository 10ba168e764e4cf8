"""Parallelism put on from outside, by module name, in one place for all families: recompute, then shard."""

import re

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lib.config.model import ModelConfig
from lib.parallel.mesh import SHARD_AXIS, sharding_mesh
from lib.parallel.shared_memory import HostMemory, SharedAllGather, SharedReduceScatter

LAYER_NAME = re.compile(r"(?:.*\.)?layers\.\d+")
"""Modules that are sharded, gathered and recomputed as units; all else belongs to the root."""


def shard_model(module: nn.Module, mesh: DeviceMesh, config: ModelConfig) -> None:
    """Shard a module in place (it may be on the meta device); forward and backward then run on all ranks together.

    Parameters stay float32 pieces and are gathered in the compute dtype. Gradients are summed over the ranks in float32 (in
    the compute dtype where that is wider), never averaged: the loss is a sum and is divided once, by the global count. Inputs
    are not cast: the rotary tables are float32 in every compute dtype.
    """
    layers = [layer for name, layer in module.named_modules() if LAYER_NAME.fullmatch(name)]
    dtype = getattr(torch, config.compute_dtype)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.promote_types(dtype, torch.float32), cast_forward_inputs=False
    )
    on_gpu, sharding = mesh.device_type == "cuda", sharding_mesh(mesh)
    for layer in layers:
        if config.activation_checkpointing:
            checkpoint(layer)
        fully_shard(layer, mesh=sharding, mp_policy=policy, reshard_after_forward=on_gpu)
    fully_shard(module, mesh=sharding, mp_policy=policy, reshard_after_forward=False)
    memory = None if on_gpu else _host_memory(mesh)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            if memory is not None:
                part.set_custom_all_gather(SharedAllGather(memory))
                part.set_custom_reduce_scatter(SharedReduceScatter(memory))


def _host_memory(mesh: DeviceMesh) -> HostMemory | None:
    group = mesh.get_group(SHARD_AXIS)
    return HostMemory.open(group) if dist.get_world_size(group) > 1 else None

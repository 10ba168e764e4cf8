"""Weights between a checkpoint folder and a sharded module: each rank reads only its own pieces."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lib.core.errors import ModelError
from lib.models.decoder import Decoder
from lib.models.families import family_of_spec
from lib.models.head_io import matching_weights, read_heads
from lib.models.heads import HeadedDecoder, initial_weight
from lib.models.hf_io import CheckpointReader, checked_weight_map, read_spec
from lib.models.lora import adapters, initial_factor, is_factor, merged


def load_sharded(module: nn.Module, folder: Path, device: torch.device | str = "cpu", *, adapter_seed: int = 0) -> int:
    """Materialise a sharded module on `device` and fill this rank's float32 pieces.

    Args:
        module: holds one Decoder, sharded by `shard_model`; on the meta device or not.
        folder: a checkpoint folder with the decoder's spec.
        adapter_seed: adapters begin as a function of this and their names, whatever the number of ranks.
    Returns:
        Bytes of tensor data read by this rank.
    Raises:
        ModelError: the folder doesn't hold exactly the decoder's weights.
    """
    decoder = decoder_of(module)
    family, spec = read_spec(folder)
    spec = replace(spec, lm_head=spec.lm_head and decoder.spec.lm_head)
    assert spec == decoder.spec, f"{folder}: config gives {spec}, the decoder was built for {decoder.spec}"
    reader = CheckpointReader(folder)
    weights = checked_weight_map(reader, family, spec)
    module.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            slices = _local_slices(parameter)
            if is_factor(name):
                piece = initial_factor(name, tuple(parameter.shape), adapter_seed)[slices]
            else:
                piece = weights.read(reader, name, slices)
            _local(parameter).copy_(piece)
        for buffer in decoder.buffers():
            buffer.zero_()
    return reader.bytes_read


def full_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, whole tensor) of each parameter, one at a time; every rank must iterate to the end.

    The tensors are the same on all ranks; keep only what rank 0 writes. What is trained is float32, the rest as the module
    holds it. Adapters are merged into their weights: W + scale * B A in float32.

    Raises:
        ModelError: the experts were balanced by a bias, for which no family's checkpoint has a place.
    """
    reshard(module)
    decoder = decoder_of(module)
    for name, buffer in decoder.named_buffers():
        if bool(buffer.any()):
            raise ModelError(f"{name} is not zero, and a {decoder.spec.family} checkpoint has no place for it")
    yield from family_of_spec(decoder.spec).weight_map(decoder.spec).to_checkpoint(_merged_tensors(decoder))


def trained_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(our name, whole float32 tensor) of each parameter that is trained; see `full_tensors`."""
    reshard(module)
    for name, parameter in decoder_of(module).named_parameters():
        if parameter.requires_grad:
            yield name, whole(parameter)


def _merged_tensors(decoder: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    layers = adapters(decoder)
    for name, parameter in decoder.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and layer in layers:
            lora = layers[layer].lora
            yield name, merged(whole(parameter), whole(lora.a), whole(lora.b), lora.scale)
        elif not is_factor(name):
            yield name, whole(parameter)


def reshard(module: nn.Module) -> None:
    """Drop the whole copies in the compute dtype that a forward pass without a backward leaves."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def load_heads(module: nn.Module, folder: Path, *, seed: int) -> None:
    """Fill this rank's pieces of the output heads: with the folder's, or anew where it has none of the name.

    Args:
        module: holds one HeadedDecoder, sharded or not, whose decoder is loaded.
        seed: of new heads; a head's first weights depend on it and the head's name alone.
    Raises:
        ModelError: the folder has a head that the module lacks, or has it for other outputs.
    """
    headed = _headed(module)
    saved = read_heads(folder)
    weights = matching_weights(saved, headed.config, folder) if saved else {}
    for name, head in headed.by_name().items():
        parameter = head.get_parameter("weight")
        num_outputs, hidden_size = parameter.shape
        whole = weights[name] if name in weights else initial_weight(name, num_outputs, hidden_size, seed)
        with torch.no_grad():
            _local(parameter).copy_(whole[_local_slices(parameter)])


def full_heads(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> whole float32 weight [O, D] of each output head; every rank must call it."""
    reshard(module)
    return {name: whole(head.get_parameter("weight")) for name, head in _headed(module).by_name().items()}


def _headed(module: nn.Module) -> HeadedDecoder:
    found = [part for part in module.modules() if isinstance(part, HeadedDecoder)]
    assert len(found) == 1, f"expected one HeadedDecoder in {type(module).__name__}, found {len(found)}"
    return found[0]


def decoder_of(module: nn.Module) -> Decoder:
    """The one Decoder in a module; names of its parameters don't depend on what is wrapped around it."""
    found = [part for part in module.modules() if isinstance(part, Decoder)]
    assert len(found) == 1, f"expected one Decoder in {type(module).__name__}, found {len(found)}"
    return found[0]


def _local_slices(parameter: torch.Tensor) -> tuple[slice, ...]:
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape))


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter put together from all ranks, which must all call this."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    # The last axis was cut first, so its parts are put together last.
    gathered = [*[Replicate()] * (parameter.device_mesh.ndim - 1), parameter.placements[-1]]
    return parameter.redistribute(placements=gathered).full_tensor().detach()


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter

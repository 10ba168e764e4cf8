"""The mesh of ranks: how a world is cut into axes, and which rows each rank gets."""

from dataclasses import dataclass
from math import prod

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lib.config.parallel import DATA_AXES, ClusterShape, ParallelConfig

SHARD_AXIS = "shard"
"""Ranks of this axis hold different pieces of each parameter, and gather it when it is used."""
REPLICATE_AXIS = "replicate"
"""Ranks of this axis hold the same pieces."""
TENSOR_AXIS = "tensor"
"""Ranks of this axis compute parts of each layer, from the same rows."""
EXPERT_AXIS = "expert"
CONTEXT_AXIS = "context"


def build_mesh(shape: ClusterShape, parallel: ParallelConfig | None = None) -> DeviceMesh:
    """The axes that have more than one rank, and always the shard axis. The process group must be up.

    Raises:
        ValueError: the sizes don't make the number of ranks.
    """
    sizes = (parallel or ParallelConfig()).sizes(shape.num_ranks)
    kept = {name: size for name, size in sizes.items() if size > 1 or name == SHARD_AXIS}
    return init_device_mesh(shape.device, tuple(kept.values()), mesh_dim_names=tuple(kept))


def sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes over which pieces of parameters are gathered and gradients summed; the expert axis is as good as more shards."""
    held = mesh.mesh_dim_names or ()
    if EXPERT_AXIS not in held:
        return expert_sharding_mesh(mesh)
    shards = mesh[SHARD_AXIS, EXPERT_AXIS]._flatten(f"{SHARD_AXIS}_{EXPERT_AXIS}")
    return DeviceMesh._concatenate([mesh[REPLICATE_AXIS], shards]) if REPLICATE_AXIS in held else shards


def expert_sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same for the weights of experts, of which the ranks of the expert axis hold different ones."""
    names = tuple(name for name in (REPLICATE_AXIS, SHARD_AXIS) if name in (mesh.mesh_dim_names or ()))
    return mesh if names == mesh.mesh_dim_names else mesh[names]


@dataclass(frozen=True)
class DataPlace:
    """Whose rows a rank trains on."""

    rank: int
    """Among the ranks that have rows of their own."""
    num_ranks: int
    is_first: bool
    """Of the ranks that have the same rows, this one is counted."""

    @staticmethod
    def of(rank: int, num_ranks: int, parallel: ParallelConfig) -> "DataPlace":
        """Of rank `rank` of all `num_ranks`; the same for all ranks that differ on the axes of tensor and context alone."""
        same = prod(size for name, size in parallel.sizes(num_ranks).items() if name not in DATA_AXES)
        return DataPlace(rank // same, num_ranks // same, rank % same == 0)

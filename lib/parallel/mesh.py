"""The mesh of ranks: how a world is cut into axes."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lib.config.parallel import ClusterShape
from lib.core.errors import ConfigError

SHARD_AXIS = "shard"
"""Ranks of this axis hold different pieces of each parameter."""
REPLICATE_AXIS = "replicate"
"""Ranks of this axis hold the same pieces."""


def build_mesh(shape: ClusterShape, num_replicas: int = 1) -> DeviceMesh:
    """All ranks on one shard axis, or `num_replicas` groups of shards. The process group must be up.

    Raises:
        ConfigError: the replicas don't divide the ranks.
    """
    if shape.num_ranks % num_replicas:
        raise ConfigError(f"{num_replicas} replicas don't divide {shape.num_ranks} ranks; choose a divisor")
    if num_replicas == 1:
        return init_device_mesh(shape.device, (shape.num_ranks,), mesh_dim_names=(SHARD_AXIS,))
    sizes = (num_replicas, shape.num_ranks // num_replicas)
    return init_device_mesh(shape.device, sizes, mesh_dim_names=(REPLICATE_AXIS, SHARD_AXIS))

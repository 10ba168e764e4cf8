"""The shape of the cluster a task runs on, and how its ranks share the model and the data."""

import math

from pydantic import Field

from lib.config.base import Frozen, Number


class ClusterConfig(Frozen):
    """Size of the Ray cluster beside the plain inputs `nodes` and `gpus_per_node`."""

    cpu_ranks_per_node: int = Field(default=2, ge=1, le=256)
    """Ranks on a node when `gpus_per_node` is 0."""
    threads_per_rank: int = Field(default=1, ge=1)
    """Compute threads of a CPU rank."""
    start_deadline_seconds: Number = Field(default=300.0, gt=0.0)
    """Time for all ranks to come up and join."""
    heartbeat_seconds: Number = Field(default=45.0, ge=5.0)
    """A rank that hasn't answered for this long is reported dead and the group is torn down."""
    accelerator: str | None = Field(default=None, pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$")
    """Kind of GPU that the nodes must have, as NVIDIA's feature discovery labels them (`nvidia.com/gpu.product`)."""
    interruptible: bool = False
    """Whether the nodes may be spot machines. Training saves when they go, and goes on when Flyte tries it again."""
    checkpoint_home: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9+.-]*://[^\s?*\[\]]+$", max_length=1024)
    """Address of an object store that keeps the runs' checkpoints, as fsspec knows it: s3://bucket/folder, gs://…; the nodes
    need no file system in common then. None: the shared home."""

    def home_of(self, run: str) -> str | None:
        """Address of what a run keeps, by the name of its folder; None: that folder."""
        return f"{self.checkpoint_home.rstrip('/')}/{run}" if self.checkpoint_home else None


AXES = ("replicate", "shard", "expert", "context", "tensor")
"""Of the mesh of ranks, the outermost first: neighbours on the last axis are neighbours on a node."""
DATA_AXES = ("replicate", "shard", "expert")
"""Ranks that differ on one of these train on different rows; the others on the same."""


class ParallelConfig(Frozen):
    """How the ranks share the model and the data. The product of all sizes is the number of ranks, which the workflow's
    inputs decide; no result depends on it but for rounding. See docs/from-laptop-to-cluster.md."""

    replicate: int = Field(default=1, ge=1)
    """Copies of the sharded model. More than 1 keeps gathers of weights within a part of the cluster, such as a node."""
    shard: int | None = Field(default=None, ge=1)
    """Ranks that hold a copy together, each a piece of every weight; None: all that the other sizes leave."""
    tensor: int = Field(default=1, ge=1)
    """Ranks that compute each layer together, each some of its heads, features and ids; keep them on one node."""
    expert: int = Field(default=1, ge=1)
    """Ranks that deal the experts of each layer out among themselves."""
    context: int = Field(default=1, ge=1)
    """Ranks that split each row of tokens among themselves."""

    def sizes(self, num_ranks: int) -> dict[str, int]:
        """Axis -> its size, in the order of AXES.

        Raises:
            ValueError: their product is not the number of ranks.
        """
        given = self.replicate * self.tensor * self.expert * self.context
        shard = num_ranks // given if self.shard is None else self.shard
        if given * shard != num_ranks:
            shown = " x ".join(f"{name} {value}" for name in AXES if (value := getattr(self, name)) not in (1, None))
            raise ValueError(
                f"config.parallel: {shown} doesn't make {num_ranks} ranks (nodes x ranks of a node); change the sizes, or "
                "nodes, gpus_per_node or config.cluster.cpu_ranks_per_node"
            )
        return {**{name: getattr(self, name) for name in AXES}, "shard": shard}

    def num_data_ranks(self, num_ranks: int) -> int:
        """Ranks, or groups of ranks, that train on rows of their own."""
        return math.prod(size for name, size in self.sizes(num_ranks).items() if name in DATA_AXES)


class ClusterShape(Frozen):
    """A resolved cluster: what the planner, the Ray job and the worker group all agree on."""

    nodes: int = Field(ge=1)
    gpus_per_node: int = Field(ge=0)
    ranks_per_node: int = Field(ge=1)
    threads_per_rank: int = Field(ge=1)
    accelerator: str | None = None
    """Label of the GPUs; None: any."""
    interruptible: bool = False
    """Whether the nodes may be spot machines."""
    shared_home: bool = True
    """The nodes mount a file system that all of them share."""

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_node else "cpu"

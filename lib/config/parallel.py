"""The shape of the cluster a task runs on."""

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


class ClusterShape(Frozen):
    """A resolved cluster: what the planner, the Ray job and the worker group all agree on."""

    nodes: int = Field(ge=1)
    gpus_per_node: int = Field(ge=0)
    ranks_per_node: int = Field(ge=1)
    threads_per_rank: int = Field(ge=1)

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_node else "cpu"

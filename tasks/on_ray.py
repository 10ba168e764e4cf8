"""How a task with ranks is declared. The dynamic task that starts it overrides the cluster with one of its job's size."""

from typing import Any

from lib.config.parallel import ClusterShape
from tasks.cache import CACHED
from tasks.clusters import ray_job
from tasks.environments import LONG, RETRIES, SMALL, TRAIN_IMAGE

ON_RAY: dict[str, Any] = {
    "cache": CACHED,
    "container_image": TRAIN_IMAGE,
    "requests": SMALL,
    "retries": RETRIES,
    "timeout": LONG,
    "task_config": ray_job(ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=1, threads_per_rank=1)),
}

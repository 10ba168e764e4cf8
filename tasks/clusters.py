"""Ray clusters, sized by a job's shape."""

import math
from dataclasses import dataclass
from typing import Any

from flytekit import FlyteContextManager, PodTemplate
from flytekit.core.context_manager import ExecutionParameters
from flytekit.extend import TaskPlugins
from flytekitplugins.ray import HeadNodeConfig, RayJobConfig, WorkerNodeConfig
from flytekitplugins.ray.task import RayFunctionTask
from kubernetes.client import (
    V1Container,
    V1EmptyDirVolumeSource,
    V1EnvFromSource,
    V1EnvVar,
    V1PersistentVolumeClaimVolumeSource,
    V1PodSpec,
    V1ResourceRequirements,
    V1SecretEnvSource,
    V1Volume,
    V1VolumeMount,
)

from lib.config.evaluation import EvalConfig
from lib.config.parallel import ClusterShape

SHM = "/dev/shm"  # noqa: S108 - a mount point inside a pod
HOME = "/postflyte"
"""$POSTFLYTE_HOME of every node of a Ray cluster: the volume claim `postflyte-home` (ReadWriteMany), from which the ranks read
the model, the data and the checkpoints of the run; or the node's own disk, with `config.cluster.checkpoint_home`."""
SECRET = "postflyte"  # noqa: S105 - a name
"""Kubernetes secret whose keys are environment variables of head and workers: tokens, addresses, credentials."""
GPU_LABEL = "nvidia.com/gpu.product"
TTL_SECONDS = 300
GRACE_SECONDS = 60
"""From SIGTERM to SIGKILL where a pod has to go: config.train.grace_seconds, and some more to end."""


@dataclass
class ClusterJob(RayJobConfig):
    """A Ray cluster made by `ray_job`."""


class ClusterTask(RayFunctionTask):
    """The plugin's Ray task; run locally it leaves it to the worker group to start a Ray with room for all ranks."""

    def pre_execute(self, user_params: ExecutionParameters) -> ExecutionParameters:
        state = FlyteContextManager.current_context().execution_state
        is_local = state is not None and state.is_local_execution()
        return user_params if is_local else super().pre_execute(user_params)


TaskPlugins.register_pythontask_plugin(ClusterJob, ClusterTask)


def ray_job(shape: ClusterShape) -> ClusterJob:
    """A Ray cluster of `shape.nodes` workers; the head runs the driver and neither ranks nor GPUs."""
    gpus = shape.gpus_per_node
    cpus = 12 * gpus if gpus else max(2, shape.ranks_per_node * shape.threads_per_rank)
    memory_gib = 160 * gpus if gpus else 16 * shape.ranks_per_node
    worker = WorkerNodeConfig(
        group_name="ranks",
        replicas=shape.nodes,
        min_replicas=shape.nodes,
        max_replicas=shape.nodes,
        pod_template=_pod("ray-worker", cpus, memory_gib, gpus=gpus, shape=shape),
    )
    head = _pod("ray-head", 4, 16, gpus=0, shape=shape)
    return ClusterJob(
        worker_node_config=[worker],
        head_node_config=HeadNodeConfig(ray_start_params={"num-cpus": "0"}, pod_template=head),
        shutdown_after_job_finishes=True,
        ttl_seconds_after_finished=TTL_SECONDS,
    )


def placed(shape: ClusterShape) -> dict[str, Any]:
    """What `with_overrides` takes for a task on a cluster of this shape. What isn't asked to run on spot machines is left to
    the execution's own setting."""
    return {"task_config": ray_job(shape), "interruptible": shape.interruptible or None}


def engine_shape(config: EvalConfig, gpus_per_node: int) -> ClusterShape:
    """The cluster that holds the engines of an evaluation: one on each GPU, or all on one CPU node."""
    per_node = min(config.engines, gpus_per_node) or config.engines
    return ClusterShape(
        nodes=math.ceil(config.engines / per_node),
        gpus_per_node=min(per_node, gpus_per_node),
        ranks_per_node=per_node,
        threads_per_rank=1 if gpus_per_node else config.engine_threads,
        interruptible=config.interruptible,
    )


def _pod(container: str, cpus: int, memory_gib: int, *, gpus: int, shape: ClusterShape) -> PodTemplate:
    """Resources, shared memory for collectives and loaders (a quarter of the memory), the home, shared or not, and the
    environment of the cluster's secret, where there is one: its values are in no spec, log or input."""
    amounts = {"cpu": str(cpus), "memory": f"{memory_gib}Gi", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    mounts = [V1VolumeMount(name="shm", mount_path=SHM), V1VolumeMount(name="postflyte-home", mount_path=HOME)]
    claim = V1PersistentVolumeClaimVolumeSource(claim_name="postflyte-home")
    kind = {"persistent_volume_claim": claim} if shape.shared_home else {"empty_dir": V1EmptyDirVolumeSource()}
    shm = V1EmptyDirVolumeSource(medium="Memory", size_limit=f"{max(1, memory_gib // 4)}Gi")
    return PodTemplate(
        primary_container_name=container,
        pod_spec=V1PodSpec(
            termination_grace_period_seconds=GRACE_SECONDS,
            node_selector={GPU_LABEL: shape.accelerator} if gpus and shape.accelerator else None,
            containers=[
                V1Container(
                    name=container,
                    resources=V1ResourceRequirements(requests=amounts, limits=amounts),
                    env=[V1EnvVar(name="POSTFLYTE_HOME", value=HOME)],
                    env_from=[V1EnvFromSource(secret_ref=V1SecretEnvSource(name=SECRET, optional=True))],
                    volume_mounts=mounts,
                )
            ],
            volumes=[V1Volume(name="shm", empty_dir=shm), V1Volume(name="postflyte-home", **kind)],
        ),
    )

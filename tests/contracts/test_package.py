"""What a cluster is told: the protobufs of `make package`, read back."""

import importlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from flyteidl.admin import launch_plan_pb2, task_pb2, workflow_pb2
from google.protobuf import json_format

from tests.conftest import REPOSITORY

IMAGES = {"cpu": "registry.test/cpu:1", "train": "registry.test/train:2"}
GPU = "nvidia.com/gpu"
RAY_TASKS = (
    "tasks.train.train_on_ray",
    "tasks.train.train_tokens_on_ray",
    "tasks.evaluate.evaluate_on_ray",
    "tasks.train_heads.train_heads_on_ray",
    "tasks.train_heads.train_heads_tokens_on_ray",
    "tasks.score_heads.score_heads_on_ray",
)
MAP_TASK = "tasks.ingest.map_ingest_shard_"
UNCACHED = (
    "tasks.ingest.data_window",
    "tasks.ingest.list_shards",
    "tasks.prepare_model.stamp_model",
    "tasks.tokenize.find_tokenizer",
)
"""They look at what is there now."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked package."""
    folder = tmp_path_factory.mktemp("package")
    images = [part for name, uri in IMAGES.items() for part in ("-i", f"{name}={uri}")]
    pyflyte = str(Path(sys.executable).with_name("pyflyte"))
    output = str(folder / "package.tgz")
    command = [pyflyte, "-c", "flyte.config", "package", "--copy", "all", "--force", "--output", output, *images]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    with tarfile.open(output) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def tasks(package: Path) -> dict[str, dict[str, Any]]:
    """Name -> task template."""
    found = {}
    for path in package.glob("*_1.pb"):
        spec = task_pb2.TaskSpec()
        spec.ParseFromString(path.read_bytes())
        found[spec.template.id.name] = json_format.MessageToDict(spec.template)
    return found


def _containers(pod: dict[str, Any]) -> dict[str, str]:
    (container,) = pod["k8sPod"]["podSpec"]["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    return dict(container["resources"]["limits"])


def _check_ray(custom: dict[str, Any], *, nodes: int, gpus: int, accelerator: str | None = None, shared: bool = True) -> None:
    """[I11] the cluster ends with its job; GPUs are asked for by workers and by nobody else. [I13] Secrets come by name."""
    assert custom["shutdownAfterJobFinishes"] is True
    assert custom["ttlSecondsAfterFinished"] == 300
    cluster = custom["rayCluster"]
    (workers,) = cluster["workerGroupSpec"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == nodes
    assert _containers(workers).get(GPU) == (str(gpus) if gpus else None)
    head = cluster["headGroupSpec"]
    assert GPU not in _containers(head)
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert _containers(head) == {"cpu": "4", "memory": "16Gi"}
    if gpus:
        assert _containers(workers) == {"cpu": str(12 * gpus), "memory": f"{160 * gpus}Gi", GPU: str(gpus)}
    selector = {"nvidia.com/gpu.product": accelerator} if accelerator else None
    assert workers["k8sPod"]["podSpec"].get("nodeSelector") == selector
    assert "nodeSelector" not in head["k8sPod"]["podSpec"]
    for pod in (workers, head):
        spec = pod["k8sPod"]["podSpec"]
        (container,) = spec["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "postflyte", "optional": True}}]
        assert {entry["name"] for entry in container["env"]} == {"POSTFLYTE_HOME"}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert volumes["shm"]["emptyDir"]["sizeLimit"].endswith("Gi")
        mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts == {"shm": "/dev/shm", "postflyte-home": "/postflyte"}
        home = volumes["postflyte-home"]
        assert home.get("persistentVolumeClaim") == ({"claimName": "postflyte-home"} if shared else None)
        assert ("emptyDir" in home) == (not shared)


def test_every_task_has_an_image_of_ours_resources_and_retries(tasks: dict[str, dict[str, Any]]) -> None:
    assert len(tasks) >= 11
    for name, template in tasks.items():
        assert template["container"]["image"] in IMAGES.values(), name
        requests = {entry["name"]: entry["value"] for entry in template["container"]["resources"]["requests"]}
        assert requests.keys() >= {"CPU", "MEMORY"}, name
        assert "GPU" not in requests, name
        assert template["metadata"]["retries"]["retries"] >= 1, name


def test_every_task_is_cached_under_a_version_of_its_own(tasks: dict[str, dict[str, Any]]) -> None:
    """[I1] the version is a hash of code and libraries, so no two tasks share one."""
    versions = {n: t["metadata"].get("discoveryVersion") for n, t in tasks.items() if t["metadata"].get("discoverable")}
    assert set(tasks) - set(versions) == set(UNCACHED)
    assert all(len(version) == 64 for version in versions.values())
    mapped = tasks.keys() - {name for name in tasks if name.startswith(MAP_TASK)}
    assert len({versions[name] for name in mapped & versions.keys()}) == len(mapped & versions.keys())


def test_shards_are_mapped_over(package: Path, tasks: dict[str, dict[str, Any]]) -> None:
    """[I9] Side by side up to a limit, each retried and cached by itself, under the version of the task that is mapped; a shard
    that fails for good fails the whole."""
    (path,) = package.glob("*_workflows.ingest.ingest_2.pb")
    spec = workflow_pb2.WorkflowSpec()
    spec.ParseFromString(path.read_bytes())
    (node,) = [node for node in spec.template.nodes if node.HasField("array_node")]
    assert node.array_node.parallelism == 32
    assert node.array_node.min_success_ratio == 1.0
    each = node.array_node.node
    (name,) = [name for name in tasks if name.startswith(MAP_TASK)]
    assert each.task_node.reference_id.name == name
    assert each.metadata.retries.retries >= 1
    assert tasks[name]["metadata"] == tasks["tasks.ingest.ingest_shard"]["metadata"]


def test_no_cached_task_is_given_an_address_that_nobody_looked_at(package: Path, tasks: dict[str, dict[str, Any]]) -> None:
    """[I2] An address that comes with a launch stands for itself, so in every workflow it first goes to a task that isn't
    cached: rows to list_shards, a model to stamp_model, whose output goes on."""
    sources = {"RawDataSource", "ModelSourceFolder", "TokenizerSourceFolder"}
    checked = 0
    for path in package.glob("*_2.pb"):
        spec = workflow_pb2.WorkflowSpec()
        spec.ParseFromString(path.read_bytes())
        module, _, name = spec.template.id.name.rpartition(".")
        inputs = getattr(importlib.import_module(module), name).python_interface.inputs
        addresses = {key for key, python_type in inputs.items() if getattr(python_type, "__name__", "") in sources}
        addresses |= {key for key, t in inputs.items() if getattr(getattr(t, "__origin__", None), "__name__", "") in sources}
        for node in spec.template.nodes:
            for binding in node.inputs:
                promise = binding.binding.promise
                if node.HasField("task_node") and promise.node_id in ("", "start-node") and promise.var in addresses:
                    assert node.task_node.reference_id.name in UNCACHED, (name, node.id, promise.var)
                    checked += 1
    assert checked >= 3


def test_ray_tasks_end_with_their_job(tasks: dict[str, dict[str, Any]]) -> None:
    """[I11] also a deadline on the whole."""
    assert {name for name, template in tasks.items() if template["type"] == "ray"} == set(RAY_TASKS)
    for name in RAY_TASKS:
        assert tasks[name]["container"]["image"] == IMAGES["train"]
        assert int(tasks[name]["metadata"]["timeout"].removesuffix("s")) > 0
        _check_ray(tasks[name]["custom"], nodes=1, gpus=0)


def test_the_nightly_plan_has_its_schedule_and_its_fixed_inputs(package: Path) -> None:
    (path,) = package.glob("*_sft_nightly_3.pb")
    plan = launch_plan_pb2.LaunchPlan()
    plan.ParseFromString(path.read_bytes())
    schedule = plan.spec.entity_metadata.schedule
    assert schedule.cron_schedule.schedule == "0 2 * * *"
    assert schedule.kickoff_time_input_arg == "kickoff_time"
    assert set(plan.spec.fixed_inputs.literals) == {"data_pattern", "model", "eval_data"}
    assert "%Y-%m-%d" in plan.spec.fixed_inputs.literals["data_pattern"].scalar.primitive.string_value
    defaults = plan.spec.default_inputs.parameters
    assert defaults["learning_rate"].default.scalar.primitive.float_value == 1e-5
    assert defaults["gpus_per_node"].default.scalar.primitive.integer == 8
    assert "model" not in defaults


def test_the_bundle_holds_the_code_and_nothing_heavy(package: Path) -> None:
    """A `lib/` in .gitignore would drop our own code without a word."""
    (bundle,) = package.glob("fast*.tar.gz")
    with tarfile.open(bundle) as archive:
        names = set(archive.getnames())
    ours = {
        path.relative_to(REPOSITORY).as_posix()
        for room in ("lib", "tasks", "workflows")
        for path in (REPOSITORY / room).rglob("*.py")
    }
    assert ours <= names
    assert not [name for name in names if name.startswith((".venv", ".quickstart", "mlruns")) or name.endswith(".safetensors")]


COMPILE = """
import json, sys
from flytekit.configuration import Image, ImageConfig, SerializationSettings, FastSerializationSettings
from flytekit.core.context_manager import ExecutionState, FlyteContextManager
from google.protobuf import json_format
from lib.config.recipes import SftJob
from tasks.artifacts import CheckpointFolder, DatasetFolder, LogitReportFolder, ModelFolder
from lib.config.evaluation import EvalConfig
from tasks.evaluate import evaluate
from tasks.train import train

def at(cls):
    artifact = cls.create()
    with artifact.write() as staged:
        (staged.path / "file").write_text("content")
    return artifact

nodes, gpus, spot = int(sys.argv[1]), int(sys.argv[2]), sys.argv[4] == "spot"
images = ImageConfig(images=[Image("cpu", "registry.test/cpu", "1"), Image("train", "registry.test/train", "2")])
settings = SerializationSettings(image_config=images, version="1", project="p", domain="d",
    fast_serialization_settings=FastSerializationSettings(enabled=True, destination_dir="/root", distribution_location="s3://b/code"))
ctx = FlyteContextManager.current_context().with_serialization_settings(settings)
with FlyteContextManager.with_context(ctx) as ctx:
    state = ctx.execution_state.with_params(mode=ExecutionState.Mode.TASK_EXECUTION)
    with FlyteContextManager.with_context(ctx.with_execution_state(state)) as ctx:
        job = SftJob.parse({"learning_rate": 1e-5, "steps": 100, "sequence_length": 512, "nodes": nodes, "gpus_per_node": gpus,
            "config": {"train": {"rows_per_step": 512},
                "cluster": {"accelerator": "NVIDIA-H100-80GB-HBM3" if gpus else None, "interruptible": spot,
                    "checkpoint_home": sys.argv[5] or None},
                "data": {"num_streams": 512, "tokenize_first": sys.argv[3] == "tokens"}}}, where="test")
        shown = []
        for entity, inputs in (
            (train, {"model": at(ModelFolder), "data": at(DatasetFolder), "report": at(LogitReportFolder), "job": job}),
            (evaluate, {"model": at(ModelFolder), "data": at(DatasetFolder),
                "config": EvalConfig(engines=max(1, nodes * gpus), interruptible=spot),
                "gpus_per_node": gpus}),
        ):
            spec = entity.compile_into_workflow(ctx, entity._task_function, **inputs)
            templates = [json_format.MessageToDict(task.to_flyte_idl()) for task in spec.tasks]
            (template,) = [found for found in templates if found["type"] == "ray"]
            beside = sorted(found["id"]["name"] for found in templates if found is not template)
            (node,) = [n.to_flyte_idl() for n in spec.nodes if n.task_node.reference_id.name == template["id"]["name"]]
            shown.append({"interruptible": node.metadata.interruptible if node.metadata.HasField("interruptible") else None,
                "image": template["container"]["image"], "custom": template["custom"], "beside": beside,
                "name": template["id"]["name"]})
print(json.dumps(shown))
"""


@pytest.mark.parametrize(
    ("nodes", "gpus", "rows", "machines", "home"),
    [
        (1, 0, "rows", "own", ""),
        (1, 8, "tokens", "spot", ""),
        (4, 8, "rows", "spot", "s3://bucket/runs"),
        (64, 8, "rows", "own", ""),
    ],
)
def test_clusters_are_sized_by_the_inputs(nodes: int, gpus: int, rows: str, machines: str, home: str) -> None:
    """[I12] compiled as propeller would, each size in a process of its own: an override lasts as long as its process. Rows are
    tokenised before the cluster starts where that is asked for. Spot machines are for the nodes that ask for them; of the
    others nothing is said, which leaves the choice to who starts the execution. Nodes that keep checkpoints in a store mount no
    common volume."""
    command = [sys.executable, "-c", COMPILE, str(nodes), str(gpus), rows, machines, home]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    train, evaluate = json.loads(result.stdout.splitlines()[-1])
    assert train["image"] == evaluate["image"] == IMAGES["train"]
    assert train["interruptible"] is evaluate["interruptible"] is (True if machines == "spot" else None)
    accelerator = "NVIDIA-H100-80GB-HBM3" if gpus else None
    _check_ray(train["custom"], nodes=nodes, gpus=gpus, accelerator=accelerator, shared=not home)
    _check_ray(evaluate["custom"], nodes=nodes, gpus=gpus)
    assert train["name"] == f"tasks.train.train{'_tokens' if rows == 'tokens' else ''}_on_ray"
    assert train["beside"] == (["tasks.tokenize.take_tokenizer", "tasks.tokenize.tokenize"] if rows == "tokens" else [])
    assert evaluate["beside"] == []

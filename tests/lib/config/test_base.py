"""Laws of configuration: every value arrives as written or is refused with its path."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lib.config.base import Frozen, Number, read_yaml
from lib.config.heads import HeadsConfig
from lib.config.recipes import HeadsJob, SftConfig, SftJob
from lib.core.errors import ConfigError

JOB: dict[str, Any] = {"learning_rate": 1e-4, "steps": 100, "sequence_length": 512, "nodes": 1, "gpus_per_node": 0}


def job_with(**changes: Any) -> SftJob:
    return SftJob.parse({**JOB, **changes}, where="job")


REFUSED = [
    ({"learning_rate": "fast"}, "learning_rate"),
    ({"learning_rate": "5"}, "learning_rate"),
    ({"learning_rate": "nan"}, "learning_rate"),
    ({"learning_rate": float("nan")}, "learning_rate"),
    ({"learning_rate": float("inf")}, "learning_rate"),
    ({"learning_rate": 0}, "learning_rate"),
    ({"learning_rate": -1e-5}, "learning_rate"),
    ({"learning_rate": True}, "learning_rate"),
    ({"learning_rate": None}, "learning_rate"),
    ({"learning_rate": 1.5}, "learning_rate"),
    ({"steps": 0}, "steps"),
    ({"steps": -1}, "steps"),
    ({"steps": 1.7}, "steps"),
    ({"steps": 100.0}, "steps"),
    ({"steps": "100"}, "steps"),
    ({"steps": "1e2"}, "steps"),
    ({"steps": True}, "steps"),
    ({"steps": [100]}, "steps"),
    ({"sequence_length": 1}, "sequence_length"),
    ({"nodes": 0}, "nodes"),
    ({"nodes": False}, "nodes"),
    ({"gpus_per_node": -1}, "gpus_per_node"),
    ({"gpus_per_node": 17}, "gpus_per_node"),
    ({"stepz": 3}, "stepz"),
    ({"config": {"optim": {"beta1": 1.0}}}, "config.optim.beta1"),
    ({"config": {"optim": {"beta1": 0.99}}}, "beta1"),
    ({"config": {"optim": {"warmup_step": 1}}}, "config.optim.warmup_step"),
    ({"config": {"optim": {"warmup_steps": 100}}}, "warmup_steps"),
    ({"config": {"model": {"compute_dtype": "fp8"}}}, "config.model.compute_dtype"),
    ({"config": {"model": {"activation_checkpointing": "off"}}}, "config.model.activation_checkpointing"),
    ({"config": {"model": {"activation_checkpointing": True}}}, "config.model.activation_checkpointing"),
    ({"config": {"model": {"compile": True}}}, "config.model.compile"),
    ({"config": {"model": {"compile": "layer", "activation_checkpointing": "selective"}}}, "picks operations of a layer"),
    ({"config": {"data": {"seed": -1}}}, "config.data.seed"),
    ({"config": {"data": {"seed": 1.7}}}, "config.data.seed"),
    ({"config": {"data": {"long_rows": "None"}}}, "config.data.long_rows"),
    ({"config": {"data": {"num_streams": 3}}}, "num_streams"),
    ({"config": {"data": []}}, "config.data"),
    ({"config": None}, "config"),
    ({"config": {"train": {"rows_per_step": 3}}}, "rows_per_step"),
    ({"config": {"train": {"rows_per_step": 4, "rows_per_micro_batch": 3}}}, "rows_per_micro_batch"),
    ({"config": {"tracking": {"mlflow": "yes"}}}, "config.tracking.mlflow"),
    ({"config": {"tracking": {"experiment": ""}}}, "config.tracking.experiment"),
    ({"config": {"cluster": {"heartbeat_seconds": 1}}}, "config.cluster.heartbeat_seconds"),
    ({"config": {"cluster": {"accelerator": "H100"}}}, "config.cluster.accelerator is H100, but gpus_per_node is 0"),
    ({"config": {"parallel": {"tensor": 0}}}, "config.parallel.tensor"),
    ({"config": {"parallel": {"tensor": 3}}}, "config.parallel: tensor 3 doesn't make 2 ranks"),
    ({"config": {"parallel": {"shard": 1}}}, "config.parallel"),
    ({"sequence_length": 33, "config": {"parallel": {"tensor": 2}}}, "sequence_length (33) is not a multiple"),
    ({"confіg": {}}, "confіg"),
]


@pytest.mark.parametrize(("changes", "path"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_a_wrong_value_is_refused_with_its_path(changes: dict[str, Any], path: str) -> None:
    """[A18] [I6] Unknown keys, wrong types, out of bounds, contradictions; nothing is coerced."""
    with pytest.raises(ConfigError) as refused:
        job_with(**changes)
    assert path in str(refused.value)


ACCEPTED = [("1e-5", 1e-5), ("1E-5", 1e-5), ("2.5e-4", 2.5e-4), (".5e-3", 5e-4), (1e-5, 1e-5), (1, 1.0)]


@pytest.mark.parametrize(("written", "value"), ACCEPTED)
def test_numerals_of_yaml_arrive_as_numbers(written: object, value: float) -> None:
    """[A19] YAML 1.1 reads `1e-5` as text; that one spelling is a number here."""
    job = job_with(learning_rate=written)
    assert job.learning_rate == value and type(job.learning_rate) is float


def test_a_configuration_survives_json_and_yaml() -> None:
    """[A19] Config -> JSON (what Flyte carries) -> config, and through YAML, with equal values and types."""
    job = job_with(config={"optim": {"warmup_steps": 7, "epsilon": "1e-9"}, "data": {"long_rows": "drop"}})
    assert SftJob.model_validate_json(job.model_dump_json()) == job
    assert SftJob.parse(yaml.safe_load(yaml.safe_dump(json.loads(job.model_dump_json()))), where="yaml") == job


def test_a_value_never_changes_after_it_was_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        job_with().steps = 3  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    """A field without a docstring that says more than its name can't be explained in a form."""
    plain = {
        "beta1",
        "beta2",
        "epsilon",
        "seed",
        "mlflow",
        "max_new_tokens",
        "deadline_seconds",
        "nodes",
        "gpus_per_node",
        "ranks_per_node",
    }
    plain |= {"threads_per_rank", "data", "model", "optim", "train", "cluster", "parallel", "tracking", "config"}

    def walk(model: type[Frozen]) -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Frozen):
                missing += walk(field.annotation)
            elif not field.description and name not in plain:
                missing.append(f"{model.__name__}.{name}")
        return missing

    assert walk(SftJob) == []


def test_the_shape_follows_the_inputs() -> None:
    """CPU ranks count on a machine without GPUs; otherwise one rank a GPU."""
    assert job_with().shape.num_ranks == SftConfig().cluster.cpu_ranks_per_node
    big = job_with(nodes=4, gpus_per_node=8, config={"train": {"rows_per_step": 32}})
    assert (big.shape.num_ranks, big.shape.device) == (32, "cuda")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "given twice"),
        ("- 1\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: [1\n", "not readable as YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "not readable as YAML"),
    ],
)
def test_a_yaml_file_that_could_mean_something_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """[A19] [L1] The last of two keys doesn't win, and no tag builds an object."""
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "x.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        read_yaml(tmp_path / "nothing.yaml")


class _Pair(Frozen):
    left: Number
    right: int


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="2 problem") as refused:
        _Pair.parse({"left": "x", "right": "y"}, where="pair.yaml")
    assert "left" in str(refused.value) and "right" in str(refused.value)


def test_a_list_with_a_wrong_item_has_one_problem() -> None:
    """It isn't too short too, for which an empty one is refused."""
    heads = {"wrong": [{"name": "a", "kind": "scalar"}, {"name": "b", "kind": "none"}], "empty": []}
    for found, words in (
        ("wrong", r": 1 problem.*\n  heads\.1\.kind: "),
        ("empty", r": 1 problem.*\n  heads: Tuple should have"),
    ):
        with pytest.raises(ConfigError, match=words):
            HeadsConfig.parse({"heads": heads[found]}, where="heads")


def test_a_home_for_checkpoints_is_an_address_and_only_training_does_without_a_shared_disk() -> None:
    heads = [{"kind": "scalar", "name": "score"}]
    for home, address in (("s3://bucket/runs/", "s3://bucket/runs/sft-1"), (None, None)):
        config = {"heads": heads, "cluster": {"checkpoint_home": home}}
        job = HeadsJob.parse({**JOB, "config": config}, where="test")
        assert job.config.cluster.home_of("sft-1") == address
        assert job.shape.shared_home == (home is None) and job.scoring.shape.shared_home
    for wrong in ("/postflyte/runs", "bucket/runs", "s3://bucket/*"):
        with pytest.raises(ConfigError, match="checkpoint_home"):
            HeadsJob.parse({**JOB, "config": {"heads": heads, "cluster": {"checkpoint_home": wrong}}}, where="test")

"""Every file in configs/ is an inputs file of its workflow, and every task's interface is made of types of ours."""

import importlib
import inspect
import typing
from pathlib import Path
from typing import Any

import pytest
from flytekit.core.base_task import PythonTask
from flytekit.core.context_manager import FlyteEntities
from flytekit.core.type_engine import TypeEngine
from flytekit.core.workflow import PythonFunctionWorkflow
from flytekit.types.pickle.pickle import FlytePickleTransformer

from lib.config.base import Frozen, read_yaml
from lib.config.recipes import HeadsJob, HeadsRecipeConfig, SftConfig, SftJob
from tests.conftest import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
JOBS = {SftConfig: SftJob, HeadsRecipeConfig: HeadsJob}
JOB_INPUTS = ("learning_rate", "steps", "sequence_length", "nodes", "gpus_per_node", "config")


def _workflow(path: Path) -> PythonFunctionWorkflow:
    """configs/<name>/x.yaml belongs to workflows/<name>.py and the workflow <name> in it."""
    name = path.parent.name
    return getattr(importlib.import_module(f"workflows.{name}"), name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_configuration_parses_into_its_workflow(path: Path) -> None:
    """[A18] no input or key that nobody reads, none missing, all in bounds, no contradiction."""
    values = read_yaml(path)
    interface = _workflow(path).python_interface
    assert set(values) <= set(interface.inputs)
    without_default = {name: kind for name, (kind, default) in interface.inputs_with_defaults.items() if default is None}
    assert {name for name, kind in without_default.items() if type(None) not in typing.get_args(kind)} <= set(values)
    for name, python_type in interface.inputs.items():
        if inspect.isclass(python_type) and issubclass(python_type, Frozen):
            python_type.parse(values.get(name, {}), where=f"{path}: {name}")
    if set(JOB_INPUTS) <= set(interface.inputs):
        job_type = JOBS[interface.inputs["config"]]
        job_type.parse({name: values[name] for name in JOB_INPUTS if name in values}, where=str(path))


def _entities() -> list[Any]:
    importlib.import_module("workflows.launch_plans")
    ours = ("tasks.", "workflows.")
    return [e for e in FlyteEntities.entities if isinstance(e, PythonTask | PythonFunctionWorkflow) and e.name.startswith(ours)]


def test_no_interface_falls_back_to_pickle() -> None:
    """[L8] flytekit would pickle any type that it doesn't know."""
    checked = 0
    for entity in _entities():
        interface = entity.python_interface
        for python_type in [*interface.inputs.values(), *interface.outputs.values()]:
            assert python_type is not typing.Any
            assert not isinstance(TypeEngine.get_transformer(python_type), FlytePickleTransformer), (
                f"{entity.name}: {python_type}"
            )
            checked += 1
    assert checked > 40

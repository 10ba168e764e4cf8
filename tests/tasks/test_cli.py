"""`pyflyte run` with an inputs file: nothing is dropped, flags win, and a mistake is named in one line with its place."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from flytekit.clis.sdk_in_container.pyflyte import main

WORKFLOW = """
from flytekit import task, workflow
from lib.config.recipes import SftConfig
from tasks.artifacts import Checkpoint
from tasks.sources import RawData
DEFAULT = SftConfig()
@task
def show(learning_rate: float, steps: int, config: SftConfig, data: RawData) -> str:
    return f"RATE={learning_rate} STEPS={steps} EPSILON={config.optim.epsilon} PACKS={config.data.open_packs}"
@workflow
def wf(
    data: RawData,
    learning_rate: float = 1e-4,
    steps: int = 100,
    config: SftConfig = DEFAULT,
    begun: Checkpoint | None = None,
) -> str:
    return show(learning_rate=learning_rate, steps=steps, config=config, data=data)
"""
INPUTS = "data: rows.jsonl\nlearning_rate: 1e-5\nsteps: 7\nconfig:\n  optim: {epsilon: 1e-7}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "wf.py").write_text(WORKFLOW)
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "wf", raising=False)
    return tmp_path


def _run(folder: Path, inputs: str, *flags: str) -> Result:
    (folder / "inputs.yaml").write_text(inputs)
    return CliRunner().invoke(main, ["run", "wf.py", "wf", "--inputs-file", "inputs.yaml", *flags])


def test_numbers_and_nested_keys_arrive(folder: Path) -> None:
    """[A19] `1e-5`, which YAML reads as a text, is a number at every level; what isn't given has its default."""
    result = _run(folder, INPUTS)
    assert "RATE=1e-05 STEPS=7 EPSILON=1e-07 PACKS=16" in result.output
    assert result.exit_code == 0


def test_a_flag_beside_the_file_wins(folder: Path) -> None:
    assert "RATE=3e-05 STEPS=9" in _run(folder, INPUTS, "--learning_rate", "3e-5", "--steps", "9").output


def test_the_configuration_can_be_a_file_of_its_own(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"data": {"open_packs": 3}}))
    assert "EPSILON=1e-08 PACKS=3" in _run(folder, INPUTS, "--config", "config.json").output


WRONG = {
    "misspelt input": (INPUTS.replace("steps", "stepps"), "stepps"),
    "misspelt key": (INPUTS.replace("epsilon", "epsilonn"), "optim.epsilonn"),
    "text for a number": (INPUTS.replace("1e-7", '"small"'), "optim.epsilon"),
    "quoted number": (INPUTS.replace("1e-7", '"7"'), "optim.epsilon"),
    "out of bounds": (INPUTS.replace("1e-7", "-1.0"), "optim.epsilon"),
    "fraction for an integer": (INPUTS.replace("steps: 7", "steps: 1.5"), "1.5"),
    "off for an integer": (INPUTS.replace("steps: 7", "steps: off"), "steps is False"),
    "nothing for an integer": (INPUTS.replace("steps: 7", "steps:"), "steps is None"),
    "key given twice": (INPUTS + "steps: 8\n", "'steps' is given twice"),
    "contradiction": (INPUTS.replace("{epsilon: 1e-7}", "{beta1: 0.99, beta2: 0.9}"), "beta1"),
    "no such file": (INPUTS.replace("rows.jsonl", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    "no such optional artifact": (INPUTS + "begun: .\n", "so not an artifact of Postflyte"),
    "not a mapping": ("- 1\n", "expected a mapping"),
    "not YAML": ("a: [1\n", "inputs.yaml"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named_and_ends_the_command(folder: Path, case: str) -> None:
    """[A18] [A19] [I6] exit code not 0, the place in the message, no traceback."""
    inputs, expected = WRONG[case]
    result = _run(folder, inputs)
    assert result.exit_code != 0
    assert expected in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output

"""A cache key sees every change of code that can change a result, and no other."""

from pathlib import Path

import pytest

from lib.core.codehash import function_code_hash, reachable_modules

PROJECT = {
    "tasks/__init__.py": "",
    "tasks/train.py": (
        "from flytekit import task\n"
        "from lib.recipe import run\n"
        "from lib.score import judge\n"
        "from tasks.place import RESOURCES\n"
        "STEPS = 3\n"
        "def helper(x):\n    return x + STEPS\n"
        "@task(requests=RESOURCES)\n"
        "def train(x):\n    '''Train.'''\n    return run(helper(x))  # go\n"
        "@task\n"
        "def evaluate(x):\n    return judge(x)\n"
    ),
    "tasks/place.py": "RESOURCES = 1\n",
    "lib/__init__.py": "",
    "lib/recipe.py": (
        "from lib import constants\nimport numpy\n"
        "def run(x):\n    from lib.lazy import more\n    return more(x, constants.RATE)\n"
    ),
    "lib/constants.py": "RATE = 0.5\nWORKER = 'lib.worker:Worker'\n",
    "lib/worker.py": "class Worker:\n    size = 1\n",
    "lib/lazy.py": "def more(x, rate):\n    '''More.'''\n    return x * rate\n",
    "lib/score.py": "def judge(x):\n    return x\n",
    "lib/unused.py": "def nothing():\n    return 0\n",
}


def _hash(root: Path, edits: dict[str, tuple[str, str]], function: str = "train") -> str:
    """Write the project to `root` with edits {file: (old text, new text)} and hash one of its tasks."""
    for name, text in PROJECT.items():
        old, new = edits.get(name, ("", ""))
        assert old in text
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(old, new) if old else text, encoding="utf-8")
    return function_code_hash(root, "tasks.train", function, ignored=("tasks.place",))


CHANGES_A_RESULT = {
    "body": ("tasks/train.py", "run(helper(x))", "run(helper(x)) + 1"),
    "helper beside it": ("tasks/train.py", "x + STEPS", "x - STEPS"),
    "constant beside it": ("tasks/train.py", "STEPS = 3", "STEPS = 4"),
    "imported function": ("lib/recipe.py", "return more(x, constants.RATE)", "return more(x, 1 + constants.RATE)"),
    "constant two imports away": ("lib/constants.py", "0.5", "0.25"),
    "module imported inside a function": ("lib/lazy.py", "x * rate", "x / rate"),
    "module named in a text": ("lib/worker.py", "size = 1", "size = 2"),
}
CHANGES_NO_RESULT = {
    "comment": ("tasks/train.py", "# go", "# go on"),
    "docstring": ("lib/lazy.py", "'''More.'''", "'''Much more.'''"),
    "layout": ("lib/lazy.py", "x * rate", "(x   *  rate)"),
    "another task's code": ("lib/score.py", "return x", "return -x"),
    "another task's body": ("tasks/train.py", "judge(x)", "judge(x, x)"),
    "resources": ("tasks/place.py", "1", "2"),
    "decorator": ("tasks/train.py", "@task(requests=RESOURCES)", "@task(requests=2)"),
    "module nobody imports": ("lib/unused.py", "return 0", "return 1"),
}


@pytest.mark.parametrize("change", CHANGES_A_RESULT)
def test_a_change_that_can_change_the_result_changes_the_hash(tmp_path: Path, change: str) -> None:
    """[I1] body, helper, constant and everything imported, however indirectly."""
    file, old, new = CHANGES_A_RESULT[change]
    assert _hash(tmp_path / "a", {}) != _hash(tmp_path / "b", {file: (old, new)})


@pytest.mark.parametrize("change", CHANGES_NO_RESULT)
def test_a_change_that_cannot_change_the_result_keeps_the_hash(tmp_path: Path, change: str) -> None:
    """[I1] comments, docstrings, layout, resources and other tasks' code don't count."""
    file, old, new = CHANGES_NO_RESULT[change]
    assert _hash(tmp_path / "a", {}) == _hash(tmp_path / "b", {file: (old, new)})


def test_two_tasks_of_one_file_are_told_apart(tmp_path: Path) -> None:
    assert _hash(tmp_path, {}, "train") != _hash(tmp_path, {}, "evaluate")


def test_libraries_outside_the_project_are_not_followed(tmp_path: Path) -> None:
    _hash(tmp_path, {})
    assert reachable_modules(tmp_path, {"lib.recipe"}) == {"lib", "lib.recipe", "lib.constants", "lib.lazy", "lib.worker"}


def test_a_function_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'missing'"):
        _hash(tmp_path, {}, "missing")

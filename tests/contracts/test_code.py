"""What no file of the project may do, read from its syntax tree."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

ROOMS = ("lib", "tasks", "workflows", "benchmarks")
SOURCES = sorted(path for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))
DOORS = {
    "ray": {"lib/cluster/ray_backend.py"},
    "vllm": {"lib/rollout/vllm_engine.py"},
    "mlflow": {"lib/train/tracking.py"},
}
"""Library -> the only files that may import it (benchmarks race peers, so they are free)."""
PICKLES = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
PICKLING_CALLS = {"torch.load", "torch.save", "numpy.load", "np.load", "joblib.load"}
RACED = {"benchmarks/checkpoint.py": {"torch.save", "torch.load"}}
"""Pickling calls that are a race's peer, on a file of their own."""


def _name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_each_heavy_library_has_one_door(path: Path) -> None:
    """Also inside functions; and flytekit stays out of lib."""
    name = _name(path)
    imported = {module.split(".")[0] for module in _imports(ast.parse(path.read_text(encoding="utf-8")))}
    if name.startswith("benchmarks/"):
        return
    for library, doors in DOORS.items():
        assert library not in imported or name in doors, f"{name} imports {library}"
    if name.startswith("lib/"):
        assert not {module for module in imported if module.startswith("flyte")}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_nothing_pickles_shells_out_or_runs_foreign_code(path: Path) -> None:
    """[L3] [L8] no pickle, no torch.load, no unsafe YAML, no shell, no eval, no trust_remote_code."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not PICKLES & {module.split(".")[0] for module in _imports(tree)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        where = f"{_name(path)}:{node.lineno}: {called}"
        refused = PICKLING_CALLS - RACED.get(_name(path), set()) | {"eval", "exec", "os.system", "os.popen"}
        assert called not in refused, where
        if called in {"yaml.load", "yaml.load_all"}:
            assert "Loader" in keywords, where
            loader = ast.unparse(keywords["Loader"])
            assert "Safe" in loader or f"class {loader}(yaml.SafeLoader)" in path.read_text(encoding="utf-8"), where
        for forbidden in ("shell", "trust_remote_code"):
            value = keywords.get(forbidden)
            assert value is None or (isinstance(value, ast.Constant) and value.value is False), f"{where}({forbidden}=...)"


def test_imports_only_go_down() -> None:
    """The layers of pyproject.toml, exhaustively: an area that no layer names is refused too."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_package_markers_are_empty_and_the_root_has_none() -> None:
    """flytekit takes the first folder without `__init__.py` for the project's root."""
    assert not (REPOSITORY / "__init__.py").exists()
    for room in ("lib", "tasks", "workflows"):
        for folder in {path.parent for path in (REPOSITORY / room).rglob("*.py")}:
            assert (folder / "__init__.py").read_text(encoding="utf-8") == "", folder


def test_tests_mirror_lib() -> None:
    """tests/lib has a folder for each area with code, and no folder or test of something that is gone."""
    areas = {path.relative_to(REPOSITORY / "lib").parts[0] for path in SOURCES if _name(path).startswith("lib/")} - {
        "__init__.py"
    }
    with_code = {area for area in areas if any(p.name != "__init__.py" for p in (REPOSITORY / "lib" / area).rglob("*.py"))}
    tested = {path.parent for path in (REPOSITORY / "tests" / "lib").rglob("test_*.py")}
    mirrored = {folder.relative_to(REPOSITORY / "tests" / "lib") for folder in tested}
    assert {folder.parts[0] for folder in mirrored} == with_code
    assert [folder for folder in mirrored if not (REPOSITORY / "lib" / folder).is_dir()] == []


def test_files_and_functions_stay_small() -> None:
    """Past 500 lines of a file or 80 of a function there is a second thing in it that wants a home."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        limit = 80 if _name(path).startswith("workflows/") else 120 if _name(path).startswith("tasks/") else 500
        assert text.count("\n") <= limit, _name(path)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno <= 80, f"{_name(path)}: {node.name}"

"""One hash for the code that a function's result depends on.

From a function, follow the names it uses to definitions of its own module and to imports; from an imported project
module, take the whole module and every project module that it imports, and so on. Comments, docstrings, layout and
decorators of the function don't count. Libraries outside the project are not followed: their versions are hashed
apart (see `lib.core.versions`).
"""

import ast
import copy
import hashlib
import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

_MODULE_REFERENCE = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)+(:[A-Za-z_]\w*)?")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def function_code_hash(root: Path, module: str, function: str, *, ignored: Collection[str] = ()) -> str:
    """Sha256 (hex) of all project code that `function` of `module` can reach.

    `ignored` names modules that don't change a result, such as those that say where a task runs.

    Raises:
        ValueError: the module isn't under `root` or doesn't define the function at its top level.
    """
    slices, reached = _slices(root, module, function)
    modules = reachable_modules(root, reached - set(ignored), ignored=ignored)
    parts = [f"{module}:{name}={text}" for name, text in sorted(slices.items())]
    parts += [f"{name}={_module_text(_module_file(root, name))}" for name in sorted(modules)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def reachable_modules(root: Path, start: Collection[str], *, ignored: Collection[str] = ()) -> set[str]:
    """Names of the project modules in `start` and of all they import, directly or not, even inside functions."""
    reached: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name in reached or name in ignored:
            continue
        reached.add(name)
        waiting += _imported_modules(root, name, _parse(_module_file(root, name)))
    return reached


def _slices(root: Path, module: str, function: str) -> tuple[dict[str, str], set[str]]:
    """Texts of the definitions of `module` that `function` uses, and names of the project modules they refer to."""
    tree = _parse(_module_file(root, module))
    definitions, imports = _top_level(tree)
    if function not in definitions:
        raise ValueError(f"{module} doesn't define {function!r} at its top level, so its code can't be hashed")
    slices: dict[str, str] = {}
    reached: set[str] = set()
    waiting = [function]
    while waiting:
        name = waiting.pop()
        if name in slices:
            continue
        nodes = [_without_decorators(node) for node in definitions[name]]
        slices[name] = "".join(_dump(node) for node in nodes)
        for node in nodes:
            reached |= set(_imported_modules(root, module, node))
            for used in _names(node):
                if used in definitions:
                    waiting.append(used)
                for statement in imports.get(used, ()):
                    reached |= set(_imported_modules(root, module, statement, only=used))
    return slices, reached


def _top_level(tree: ast.Module) -> tuple[dict[str, list[ast.stmt]], dict[str, list[ast.stmt]]]:
    """Name -> statements that define it, and name -> import statements that bind it."""
    definitions: dict[str, list[ast.stmt]] = {}
    imports: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                imports.setdefault(alias.asname or alias.name.split(".")[0], []).append(statement)
        elif isinstance(statement, Definition):
            definitions.setdefault(statement.name, []).append(statement)
        else:
            for name in {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}:
                definitions.setdefault(name, []).append(statement)
    return definitions, imports


def _names(node: ast.AST) -> set[str]:
    return {found.id for found in ast.walk(node) if isinstance(found, ast.Name)}


def _without_decorators(node: ast.stmt) -> ast.stmt:
    if not isinstance(node, Definition):
        return node
    bare = copy.copy(node)
    bare.decorator_list = []
    return bare


def _imported_modules(root: Path, module: str, node: ast.AST, only: str | None = None) -> Iterator[str]:
    """Project modules that import statements and texts such as "lib.recipes.sft:SftWorker" in `node` name."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            names = [alias.name for alias in found.names if only in (None, alias.asname or alias.name.split(".")[0])]
        elif isinstance(found, ast.ImportFrom):
            base = _absolute(root, module, found)
            names = [base, *(f"{base}.{alias.name}" for alias in found.names if only in (None, alias.asname or alias.name))]
        elif isinstance(found, ast.Constant) and isinstance(found.value, str) and _MODULE_REFERENCE.fullmatch(found.value):
            names = [found.value.partition(":")[0]]
        else:
            continue
        yield from (name for name in names if _find_module(root, name))


def _absolute(root: Path, module: str, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    package = module.split(".")
    is_package = _module_file(root, module).name == "__init__.py"
    kept = package[: len(package) - statement.level + is_package]
    return ".".join([*kept, *([statement.module] if statement.module else [])])


def _module_file(root: Path, module: str) -> Path:
    found = _find_module(root, module)
    if found is None:
        raise ValueError(f"module {module} is not under {root}")
    return found


@cache
def _find_module(root: Path, module: str) -> Path | None:
    if not module:
        return None
    base = root.joinpath(*module.split("."))
    for candidate in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def _module_text(path: Path) -> str:
    return _dump(_parse(path))


def _dump(node: ast.AST) -> str:
    """The node without positions, comments and docstrings (any statement that is only a text)."""
    return ast.dump(_Bare().visit(copy.deepcopy(node)))


class _Bare(ast.NodeTransformer):
    """Drops statements that are only a text."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)

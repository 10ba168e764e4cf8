"""What every configuration value shares: frozen, strict, and refusing what it doesn't know."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from lib.core.errors import ConfigError

_NUMERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def _numeral(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` as a string; that one spelling of a number is taken, no other string is."""
    if isinstance(value, str) and _NUMERAL.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be finite")
    return value


Number = Annotated[float, BeforeValidator(_numeral)]
"""A finite float; also takes the text of a number with an exponent, such as "1e-5"."""


class Frozen(BaseModel):
    """Base of all configuration: unknown keys and wrong types are errors, nothing is coerced, values never change."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, ser_json_inf_nan="strings"
    )

    @classmethod
    def parse(cls, values: object, *, where: str) -> Self:
        """Build from plain values; `where` names their source in errors.

        Raises:
            ConfigError: lists each wrong key with its path, the value found and what is expected.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, where)) from error

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **_: Any) -> Self:
        """As strict as everywhere else, also when a caller such as flytekit asks for the lax way.

        A console sends every number as a float, so a float without a fraction is taken where an integer is expected.

        Raises:
            ConfigError: see `parse`.
        """
        try:
            return super().model_validate_json(json.dumps(_with_integers(json.loads(json_data))), strict=True)
        except ValidationError as error:
            raise ConfigError(explain(error, cls.__name__)) from error


def _with_integers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _with_integers(item) for key, item in value.items()}
    return [_with_integers(item) for item in value] if isinstance(value, list) else value


def explain(error: ValidationError, where: str) -> str:
    """One line a problem: path, what is wrong, the value found."""
    problems = error.errors()
    # A list is also called too short where its only fault is that items in it are wrong.
    inner = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    problems = [problem for problem in problems if problem["type"] != "too_short" or problem["loc"] not in inner]
    lines = [f"{where}: {len(problems)} problem(s) in the configuration"]
    for problem in problems:
        path = ".".join(str(part) for part in problem["loc"]) or "(top level)"
        found = "" if problem["type"] in {"missing", "extra_forbidden"} else f"; found {problem['input']!r}"
        advice = "; no such key, check the spelling" if problem["type"] == "extra_forbidden" else ""
        lines.append(f"  {path}: {problem['msg']}{found[:200]}{advice}")
    return "\n".join(lines)


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML would let the last one win)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a key given twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, expected a mapping of keys to values")
    return values

"""Tools as gpt-oss is told of them: TypeScript types in a namespace, in the developer message."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lib.tokens.layout import FormatRefused

_PLAIN = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null"}
_KNOWN = {"type", "properties", "required", "description", "enum", "items", "default", "nullable", "additionalProperties"}


def tools_text(tools: Sequence[str]) -> str:
    """The section `# Tools` for functions given as JSON.

    Raises:
        FormatRefused: a schema uses what has no form here (oneOf, $ref, ...).
    Source: the harmony response format's "function calling" section; equal to openai_harmony's rendering in the tests.
    """
    lines = ["# Tools", "", "## functions", "", "namespace functions {", ""]
    for tool in tools:
        value = json.loads(tool)
        function = value.get("function", value)
        lines += [f"// {line}" for line in str(function.get("description", "")).splitlines()]
        parameters = function.get("parameters")
        arguments = f"_: {_type(parameters, '', function['name'])}" if parameters is not None else ""
        lines += [f"type {function['name']} = ({arguments}) => any;", ""]
    return "\n".join([*lines, "} // namespace functions"])


def _type(schema: Any, indent: str, tool: str) -> str:
    """A JSON schema as a TypeScript type."""
    unknown = sorted(set(schema) - _KNOWN) if isinstance(schema, dict) else [repr(schema)]
    if unknown:
        raise FormatRefused(f"the parameters of the tool {tool!r} use {unknown[0]}, which harmony has no form for here")
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join("null" if each == "null" else _type({**schema, "type": each}, indent, tool) for each in kind)
    if kind == "object":
        return _object(schema, indent, tool)
    if kind == "array":
        return f"{_type(schema['items'], indent, tool)}[]" if "items" in schema else "Array<any>"
    if kind == "string" and "enum" in schema:
        values = [f'"{value}"' for value in schema["enum"] if isinstance(value, str)]
        return " | ".join(values) or "string"
    return _PLAIN.get(str(kind), "any")


def _object(schema: Mapping[str, Any], indent: str, tool: str) -> str:
    lines = [f"{indent}// {schema['description']}"] if "description" in schema else []
    lines.append("{")
    for name, value in schema.get("properties", {}).items():
        if isinstance(value, dict) and "description" in value:
            lines.append(f"{indent}// {value['description']}")
        kind = _type(value, indent + "    ", tool)
        kind += " | null" if value.get("nullable") and "null" not in kind else ""
        optional = "" if name in schema.get("required", ()) else "?"
        lines.append(f"{indent}{name}{optional}: {kind},{_default(value)}")
    return "\n".join([*lines, f"{indent}}}"])


def _default(schema: Mapping[str, Any]) -> str:
    if "default" not in schema:
        return ""
    value = schema["default"]
    if isinstance(value, str):
        return f" // default: {value}" if "enum" in schema else f' // default: "{value}"'
    return f" // default: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"

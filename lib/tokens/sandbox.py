"""Chat templates are programs that came with a model: each is first run in a child process with little memory and time."""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

MEMORY_BYTES = 32 << 20
CPU_SECONDS = 2
WALL_SECONDS = 60
"""A busy machine may give the child little of its time; a template that sleeps can't be written in Jinja."""
MAX_CHARACTERS = 1 << 20
_CHILD = Path(__file__).with_name("sandbox_child.py")

_CALL = {"type": "function", "id": "call00001", "function": {"name": "look_up", "arguments": {"word": "x"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "it"}}},
    },
}
_QUESTION, _ANSWER = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}
_CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [_QUESTION],
    [_QUESTION, _ANSWER],
    [{"role": "system", "content": "rules"}, _QUESTION, _ANSWER],
    [{"role": "developer", "content": "rules"}, _QUESTION, {**_ANSWER, "reasoning_content": "thought", "thinking": "thought"}],
    [_QUESTION, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, {"role": "tool", "content": "found"}, _ANSWER],
    [_QUESTION, _ANSWER] * 40,
    [{"role": "user", "content": "long " * 2000}, _ANSWER],
)


@lru_cache(maxsize=256)
def template_problem(template: str, variables: tuple[tuple[str, str], ...]) -> str | None:
    """Render sample conversations in a child process with limits on memory, time and length of text; once a template.

    Args:
        variables: names and values that the template may use, such as bos_token.
    Returns: which limit was passed or why it isn't valid Jinja; None for a template that may be rendered in this process.
    """
    renderings = [
        {**dict(variables), "messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        for messages in _CONVERSATIONS
        for tools in (None, [_TOOL])
        for prompt in (False, True)
    ]
    request = {
        "template": template,
        "renderings": renderings,
        "memory_bytes": MEMORY_BYTES,
        "cpu_seconds": CPU_SECONDS,
        "max_characters": MAX_CHARACTERS,
    }
    return _run(json.dumps(request))


def _run(request: str) -> str | None:
    """None where all went well, else what didn't."""
    # -I: the child sees no PYTHONPATH, no user packages and not this folder.
    command = [sys.executable, "-I", str(_CHILD)]
    try:
        done = subprocess.run(command, input=request, text=True, capture_output=True, timeout=WALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"ran for more than {WALL_SECONDS} seconds"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"used more than {CPU_SECONDS} seconds of processor time or crashed (signal {-done.returncode})"
    last = done.stderr.strip().splitlines()
    return f"can't be used ({last[-1] if last else f'exit status {done.returncode}'})"

"""The limited child process of lib.tokens.sandbox: renders one chat template over sample conversations and reports.

Run as a file, with nothing but the standard library and jinja2, so that it starts in a fraction of a second.
"""

import json
import resource
import sys
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

PAGE_BYTES = resource.getpagesize()


class Generation(Extension):
    """`{% generation %}` as transformers knows it: its body, unchanged."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> int:
    """Read a request from standard input; 0 when every conversation was rendered or refused by the template itself."""
    request = json.load(sys.stdin)
    _limit(request["memory_bytes"], request["cpu_seconds"])
    try:
        _render_all(request)
    except MemoryError:
        return _fail(f"needs more than {request['memory_bytes'] >> 20} MiB")
    except SecurityError as error:
        return _fail(f"reaches for what a template must not have: {error}")
    except (jinja2.TemplateSyntaxError, OverflowError, RecursionError) as error:
        return _fail(f"{type(error).__name__}: {error}")
    return 0


def _render_all(request: dict[str, Any]) -> None:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda _: "2024-07-26")
    template = environment.from_string(request["template"])
    for values in request["renderings"]:
        num_characters = 0
        try:
            for block in template.generate(**values):
                num_characters += len(block)
                if num_characters > request["max_characters"]:
                    raise MemoryError
        except SecurityError:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError, ZeroDivisionError):
            continue  # this conversation is not for this template; whether one is, is found out where it is used


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        in_use = int(file.read().split()[0]) * PAGE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (in_use + memory_bytes, in_use + memory_bytes))
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _fail(reason: str) -> int:
    sys.stderr.write(reason)
    return 1


if __name__ == "__main__":
    sys.exit(main())

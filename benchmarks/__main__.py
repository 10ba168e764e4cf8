"""`python -m benchmarks <name> [options]`: run benchmarks/<name>.py.

Progress goes to stderr; the last line of stdout is one JSON object (see benchmarks/report.py).
"""

import importlib
import sys
from pathlib import Path

from benchmarks.report import apply_cpu_profile

_SCAFFOLD = {"__init__", "__main__", "killing", "ranks", "report", "trial"}


def names() -> list[str]:
    """Every benchmark there is: the files beside this one."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _SCAFFOLD)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in names():
        print(f"usage: python -m benchmarks <name> [options]; names: {', '.join(names())}", file=sys.stderr)
        return 2
    apply_cpu_profile()
    importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
    return 0


if __name__ == "__main__":
    sys.exit(main())

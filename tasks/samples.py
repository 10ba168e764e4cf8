"""`python -m tasks.samples RUN --step 12`: the samples of a step; `--id row-7`: the steps of a sample. One a line."""

import argparse
import sys
from pathlib import Path

from lib.core.errors import PostflyteError
from lib.data.inspection import printable
from lib.train.samples import samples_of_step, steps_of_sample


def main(arguments: list[str] | None = None) -> int:
    """0 when all is shown; 1 with one message where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tasks.samples", description="Which samples a step was made of, or when.")
    parser.add_argument("run", type=Path, help="a run's folder, a checkpoint, or a metrics.jsonl")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--step", type=int, help="show the ids of its samples")
    asked.add_argument("--id", help="show the steps that the sample was part of")
    flags = parser.parse_args(arguments)
    try:
        found = samples_of_step(flags.run, flags.step) if flags.id is None else steps_of_sample(flags.run, flags.id)
    except (PostflyteError, OSError) as error:
        sys.stderr.write(f"samples: {error}\n")
        return 1
    sys.stdout.writelines(f"{_shown(one)}\n" for one in found)
    return 0


def _shown(found: str | int) -> str:
    """Ids are foreign text, which a terminal must not obey."""
    return printable(str(found)).replace("\n", "\\n")


if __name__ == "__main__":
    sys.exit(main())

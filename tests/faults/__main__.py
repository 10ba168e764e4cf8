"""`python -m tests.faults [--kind task] --trials 10`: a drill; one JSON object last, exit code 1 if a run didn't survive.

Kinds: `task` kills the real train task and `sigterm` warns it before (tests/faults/drill.py); `store`, `io` and `bitflip`
harm a run that only saves checkpoints (tests/faults/store_drill.py), hundreds of times; `objects` kills one that saves into an
object store at each put and delete (tests/faults/object_drill.py); `ray` kills and stops ranks, nodes
and drivers of a small cluster (tests/faults/ray_drill.py). `io` and `objects` take every case there is and no number of trials.
"""

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.faults import object_drill, ray_drill, store_drill
from tests.faults.drill import run_drill


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kind", choices=("task", "sigterm", "store", "io", "bitflip", "objects", "ray"), default="task")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="printed with the result; repeats its moments")
    options = parser.parse_args()
    if options.trials < 1:
        parser.error(f"--trials {options.trials}: at least 1")
    root = Path(tempfile.mkdtemp(prefix="postflyte-faults-"))
    print(f"logs in {root}, seed {options.seed}", file=sys.stderr, flush=True)
    if options.kind == "io":
        figures = store_drill.run_io_errors(root)
    elif options.kind == "objects":
        figures = object_drill.run_kills()
    else:
        drills = {
            "task": run_drill,
            "sigterm": partial(run_drill, kind="sigterm", victims=("warned",)),
            "store": store_drill.run_kills,
            "bitflip": store_drill.run_bitflips,
            "ray": ray_drill.run_drill,
        }
        figures = drills[options.kind](root, options.trials, seed=options.seed)
    print(json.dumps(figures))
    return 0 if figures["survived"] == figures["trials"] and not figures["hangs"] + figures["leaks"] else 1


if __name__ == "__main__":
    sys.exit(main())

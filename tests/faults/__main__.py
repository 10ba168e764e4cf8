"""`python -m tests.faults --trials 10`: the kill drill; prints one JSON object last, exit code 1 if a run didn't survive."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.drill import run_drill


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="printed with the result; repeats its moments")
    options = parser.parse_args()
    if options.trials < 1:
        parser.error(f"--trials {options.trials}: at least 1")
    root = Path(tempfile.mkdtemp(prefix="postflyte-faults-"))
    print(f"logs in {root}, seed {options.seed}", file=sys.stderr, flush=True)
    figures = run_drill(root, options.trials, seed=options.seed)
    print(json.dumps(figures))
    return 0 if figures["survived"] == figures["trials"] and not figures["hangs"] + figures["leaks"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""The gate of the model families: random models against transformers, and planted faults that must be rejected.

    python -m tests.gate --family all|<name> [--configs 40] [--seed 0]

The last line is one JSON object; the exit status is 1 where a family differs or a fault passes.
"""

import argparse
import json
import sys
from typing import Any

import torch
from transformers.utils import logging

from lib.models.families import FAMILIES
from lib.models.verify import compare_random, greatest
from lib.models.verify_configs import random_case
from tests.lib.models.mutants import MUTANTS, is_rejected


def verify_family(family: str, num_configs: int, seed: int) -> dict[str, Any]:
    """Figures of `num_configs` random models; prints what is over its limit."""
    results = [compare_random(random_case(family, seed, index), seed + index) for index in range(num_configs)]
    problems = [problem for result in results for problem in result.problems()]
    print("\n".join([f"{family}: {len(results)} random models, {len(problems)} problem(s)", *problems]), flush=True)
    first = next((result for result in results if result.first_difference), None)
    return {
        "configs": len(results),
        "max_logit_diff": greatest([result.logit_diff for result in results]),
        "max_grad_diff": greatest([result.grad_diff or 0.0 for result in results]),
        "packed_diff": greatest([result.packed_diff for result in results]),
        "leaked_bits": sum(result.leaked for result in results),
        "problems": problems,
        "first_difference": first and {"model": first.model, **first.first_difference.model_dump()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gate")
    parser.add_argument("--family", default="all", choices=["all", *FAMILIES])
    parser.add_argument("--configs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    families = list(FAMILIES) if args.family == "all" else [args.family]
    figures = {family: verify_family(family, args.configs, args.seed) for family in families}
    planted = [name for name, (family, *_) in MUTANTS.items() if family in families]
    passed = [name for name in planted if not is_rejected(name)]
    print("\n".join([f"{len(planted)} planted faults, {len(passed)} not noticed", *passed]), flush=True)
    verdict = {"families": figures, "mutants": len(planted), "rejected": len(planted) - len(passed), "not_noticed": passed}
    print(json.dumps(verdict), flush=True)
    return int(bool(passed) or any(figure["problems"] for figure in figures.values()))


if __name__ == "__main__":
    sys.exit(main())

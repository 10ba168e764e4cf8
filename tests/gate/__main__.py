"""The gate of the model families: random models against transformers, and planted faults that must be rejected.

    python -m tests.gate --family all|<name> [--configs 40] [--seed 0]

The last line is one JSON object; the exit status is 1 where a family differs or a fault passes.
"""

import argparse
import json
import sys
import traceback
from typing import Any

import torch
from transformers.utils import logging

from lib.models.families import FAMILIES
from lib.models.logit_report import CaseResult
from lib.models.verify import compare_random, greatest
from lib.models.verify_configs import DRAWS, random_case
from tests.lib.models.mutants import MUTANTS, is_rejected


def verify_family(family: str, num_configs: int, seed: int) -> dict[str, Any]:
    """Figures of `num_configs` random models; prints what is over its limit, or what the family's file raises."""
    results, raised = [], [] if family in DRAWS else [f"{family} has no line in DRAWS of lib/models/verify_configs.py"]
    for index in range(0 if raised else num_configs):
        try:
            case = random_case(family, seed, index)
            results.append(compare_random(case, seed + index))
        except Exception as error:  # noqa: BLE001 - there is a verdict whatever the file of a family raises
            raised.append(_place_of(error))
            continue
        if case.spec.family != family:
            raised.append(f"spec_from_config calls the family {case.spec.family!r}; its MODEL_TYPE is {family!r}")
    problems = [*dict.fromkeys(raised), *(problem for result in results for problem in result.problems())]
    print("\n".join([f"{family}: {len(results)} random models, {len(problems)} problem(s)", *problems]), flush=True)
    first = next((result for result in results if result.first_difference), None)
    return {
        "configs": len(results),
        **(_greatest_of(results) if results else {}),
        "leaked_bits": sum(result.leaked for result in results),
        "problems": problems,
        "first_difference": first and {"model": first.model, **first.first_difference.model_dump()},
    }


def _greatest_of(results: list[CaseResult]) -> dict[str, float]:
    return {
        "max_logit_diff": greatest([result.logit_diff for result in results]),
        "max_grad_diff": greatest([result.grad_diff or 0.0 for result in results]),
        "packed_diff": greatest([result.packed_diff for result in results]),
    }


def _place_of(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {place.filename}:{place.lineno}: {error}"


def verify_faults(families: list[str]) -> dict[str, Any]:
    """How many planted faults of these families are rejected; prints those that are not. A family without any counts as one
    that passed: nothing says that its models would notice a fault."""
    planted = [name for name, (family, *_) in MUTANTS.items() if family in families]
    bare = [f"none of {family} is planted" for family in families if family not in {MUTANTS[name][0] for name in planted}]
    passed = [problem for name in planted if (problem := _passing(name))]
    print("\n".join([f"{len(planted)} planted faults, {len(passed)} not noticed", *passed, *bare]), flush=True)
    return {"mutants": len(planted), "rejected": len(planted) - len(passed), "not_noticed": [*passed, *bare]}


def _passing(mutant: str) -> str:
    """Empty where the fault is rejected; else its name, and why it can't be tried where it can't."""
    try:
        return "" if is_rejected(mutant) else mutant
    except Exception as error:  # noqa: BLE001 - a fault that isn't tried is one that isn't noticed
        return f"{mutant}: {_place_of(error)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gate")
    parser.add_argument("--family", default="all")
    parser.add_argument("--configs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.family not in ("all", *FAMILIES):
        parser.error(
            f"no family {args.family!r}; known: {', '.join(FAMILIES)}. A new one needs its line in lib/models/families.py"
        )
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    families = list(FAMILIES) if args.family == "all" else [args.family]
    figures = {family: verify_family(family, args.configs, args.seed) for family in families}
    verdict = {"families": figures, **verify_faults(families)}
    print(json.dumps(verdict), flush=True)
    return int(bool(verdict["not_noticed"]) or any(figure["problems"] for figure in figures.values()))


if __name__ == "__main__":
    sys.exit(main())

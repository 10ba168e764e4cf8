"""`python -m tasks.verify_model <folder>`: does a checkpoint folder compute what transformers and vLLM compute?

A folder of no family here is computed by transformers itself; what the check can't tell of it is said as "not proven". The
last line is one JSON object; the exit status is 1 where something differs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from lib.cluster.local import LocalGroup
from lib.core.errors import PostflyteError
from lib.recipes.verify_model import check_model


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.verify_model", description=__doc__)
    parser.add_argument("folder", type=Path, help="a Hugging Face folder: config, safetensors, tokenizer")
    parser.add_argument("--configs", type=int, default=40, help="random models of the family to compare")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="postflyte-verify-") as work_dir:
            found = check_model(options.folder, Path(work_dir), group_factory=LocalGroup, num_configs=options.configs)
    except PostflyteError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    said = [*found.problems, *(f"not proven: {what}" for what in found.not_proven)]
    sys.stdout.write("".join(f"{line}\n" for line in said))
    sys.stdout.write(json.dumps(found.to_json()) + "\n")
    return int(bool(found.problems))


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.masks`: ids and loss masks of thousands of random conversations in every chat format against the oracles.

Prints one JSON object: per format the conversations compared and how many differ, with and without thinking trained.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from tests.lib.tokens.formats import Format, formats

_BATCH = 50


def main() -> int:
    """0 when every id and every mask is the oracle's."""
    parser = argparse.ArgumentParser(prog="python -m tests.masks", description=__doc__)
    parser.add_argument("--conversations", type=int, default=1000, help="for each format")
    parser.add_argument("--formats", nargs="*", help="names of formats; all by default")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for form in formats(Path(scratch)):
            if not options.formats or form.name in options.formats:
                found[form.name] = compare(form, options.conversations)
    sys.stdout.write(json.dumps({"masks": found}) + "\n")
    return int(any(result["differ"] for result in found.values()))


def compare(form: Format, num_conversations: int) -> dict[str, int]:
    """Encode and compare; every second batch without thinking trained, where the format thinks."""
    answers_only = replace(form, rules=replace(form.rules, train_thinking=False)) if form.thinks else form
    tokens = differ = trained = 0
    for start in tqdm(range(0, num_conversations, _BATCH), desc=form.name, unit_scale=_BATCH, unit="row"):
        chosen = answers_only if start // _BATCH % 2 else form
        rows = [form.conversation(number) for number in range(start, min(start + _BATCH, num_conversations))]
        for row, encoded in zip(rows, chosen.encoder.encode(rows)):
            ids, mask = form.oracle(row, thinking=chosen.rules.train_thinking)
            tokens, trained = tokens + len(ids), trained + sum(mask)
            differ += (encoded.token_ids, encoded.loss_mask) != (ids, mask)
    return {"conversations": num_conversations, "differ": differ, "tokens": tokens, "trained_tokens": trained}


if __name__ == "__main__":
    sys.exit(main())

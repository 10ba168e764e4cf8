"""`python -m tasks.quickstart`: assets, then the SFT workflow on a real model; ends with a table and one line of JSON.

Arguments are handed on to the workflow: `python -m tasks.quickstart --learning_rate 3e-5`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from rich.console import Console
from rich.table import Table

from lib.core.codehash import function_code_hash
from lib.core.paths import mlflow_uri
from lib.train.environment import cpu_environment

REPOSITORY = Path(__file__).resolve().parents[1]
ASSETS = REPOSITORY / ".quickstart"
MODEL_NAME, DATA_NAME = "smollm2", "chain_sum"
STAMP = ASSETS / "stamp"
CONFIG = "configs/sft/smollm2_quickstart.yaml"
REPORT_TASK = "tasks.publish.summarize"
RESULT_KEYS = (
    "accuracy_before",
    "accuracy_after",
    "num_eval",
    "loss_first",
    "loss_last",
    "train_seconds",
    "checkpoint_digest",
)


def main(arguments: list[str]) -> int:
    """Returns the exit code of the step that failed, or 0."""
    started = time.monotonic()
    os.environ.update(cpu_environment(threads=os.cpu_count() or 1))
    if not assets_are_current():
        code = subprocess.run([sys.executable, "-m", "tasks.assets"], cwd=REPOSITORY, check=False).returncode
        if code:
            return code
    with tempfile.TemporaryDirectory(prefix="postflyte-quickstart-") as scratch:
        ledger = Path(scratch) / "ledger.jsonl"
        code = run_workflow(arguments, ledger)
        if code:
            return code
        print_result(read_result(ledger) | {"total_seconds": round(time.monotonic() - started, 1)})
    return 0


def assets_stamp() -> str:
    """Digest of all code that makes the assets."""
    return function_code_hash(REPOSITORY, "tasks.assets", "main", ignored={"tasks.quickstart"})


def write_stamp(stamp: str) -> None:
    STAMP.write_text(stamp + "\n", encoding="utf-8")


def assets_are_current() -> bool:
    """Whether model and data are there, made by the present code."""
    files = (
        STAMP,
        ASSETS / MODEL_NAME / "model.safetensors",
        ASSETS / DATA_NAME / "train.jsonl",
        ASSETS / DATA_NAME / "eval.jsonl",
    )
    return all(file.is_file() for file in files) and STAMP.read_text(encoding="utf-8").strip() == assets_stamp()


def run_workflow(arguments: list[str], ledger: Path) -> int:
    """Run the workflow in a process of its own, so that its cache, Ray and logs are those of any `pyflyte run`."""
    pyflyte = Path(sys.executable).with_name("pyflyte")
    command = [str(pyflyte), "-c", "flyte.config", "run", "workflows/sft.py", "sft", "--inputs-file", CONFIG, *arguments]
    environment = {**os.environ, "POSTFLYTE_LEDGER": str(ledger)}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode


def read_result(ledger: Path) -> dict[str, Any]:
    """The run's figures: what the report says, and which tasks the ledger says were executed or cached."""
    events = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    report = next(event for event in reversed(events) if event["task"] == REPORT_TASK)
    folder = Path(url2pathname(urlparse(next(iter(report["outputs"].values()))).path))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        **{key: summary[key] for key in RESULT_KEYS},
        "tasks_executed": sum(event["event"] == "executed" for event in events),
        "tasks_cached": sum(event["event"] == "cached" for event in events),
        "deck": str(folder / "report.html"),
        "mlflow_uri": mlflow_uri(),
    }


def print_result(result: dict[str, Any]) -> None:
    """A table for people, then the same as the last line for programs."""
    table = Table(title="SmolLM2-135M on two-digit sums", title_justify="left", show_header=False)
    rows = (
        (f"accuracy on {result['num_eval']} held-out questions, before and after", "accuracy_before", "accuracy_after", ".3f"),
        ("loss of the first and the last step", "loss_first", "loss_last", ".3f"),
        ("seconds of training and in total", "train_seconds", "total_seconds", ".0f"),
        ("tasks executed and taken from the cache", "tasks_executed", "tasks_cached", "d"),
    )
    for name, left, right, style in rows:
        table.add_row(name, format(result[left], style), format(result[right], style))
    Console().print(table)
    print(f"Report: {result['deck']}\nMLflow: make ui")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

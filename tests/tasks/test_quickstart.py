"""What the quickstart reads from a run: figures from the report, counts from the ledger, and when assets are current."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lib.core.codehash import reachable_modules
from tasks import quickstart
from tests.conftest import REPOSITORY

SUMMARY = {
    "accuracy_before": 0.05,
    "accuracy_after": 0.7,
    "num_eval": 256,
    "loss_first": 0.9,
    "loss_last": 0.2,
    "train_seconds": 100.0,
    "checkpoint_digest": "ab" * 32,
    "more": "is left out",
}


def ledger(folder: Path, *events: tuple[str, str]) -> Path:
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    path = folder / "ledger.jsonl"
    lines = [{"event": event, "task": task, "outputs": {"o0": f"file://{folder}"}, "seconds": 1.0} for event, task in events]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_result_is_the_report_and_the_counts_of_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the three events are executions, one is a hit."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    path = ledger(
        tmp_path, ("cached", "tasks.ingest.ingest"), ("executed", "tasks.train.run"), ("executed", quickstart.REPORT_TASK)
    )
    assert quickstart.read_result(path) == {
        **{key: value for key, value in SUMMARY.items() if key != "more"},
        "tasks_executed": 2,
        "tasks_cached": 1,
        "deck": str(tmp_path / "report.html"),
        "mlflow_uri": "sqlite:///x.db",
    }


def test_the_last_line_is_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result: dict[str, Any] = quickstart.read_result(ledger(tmp_path, ("executed", quickstart.REPORT_TASK)))
    quickstart.print_result(result | {"total_seconds": 12.0})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result | {"total_seconds": 12.0}


def test_assets_are_current_only_when_all_is_there_and_the_code_that_made_them_is_the_present_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "ASSETS", tmp_path)
    monkeypatch.setattr(quickstart, "STAMP", tmp_path / "stamp")
    for name in ("smollm2/model.safetensors", "chain_sum/train.jsonl", "chain_sum/eval.jsonl"):
        assert not quickstart.assets_are_current()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    quickstart.write_stamp(quickstart.assets_stamp())
    assert quickstart.assets_are_current()
    quickstart.write_stamp("made by other code")
    assert not quickstart.assets_are_current()


def test_the_stamp_sees_the_code_of_importer_and_generator() -> None:
    reached = reachable_modules(REPOSITORY, {"tasks.assets"}, ignored={"tasks.quickstart"})
    assert {"lib.data.chain_sum", "lib.models.gguf_import", "lib.models.import_check", "lib.core.assets"} <= reached


def test_the_wrapper_imports_nothing_heavy() -> None:
    """A second run must end in seconds: what takes seconds to import stays out of the wrapper's process."""
    heavy = "{'torch', 'flytekit', 'ray', 'mlflow', 'transformers', 'vllm'}"
    code = f"import sys, tasks.quickstart; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_the_exit_code_of_the_run_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument the workflow doesn't have ends the run; no figures are printed."""
    monkeypatch.setattr(quickstart, "assets_are_current", lambda: True)
    monkeypatch.setenv("FLYTE_LOCAL_CACHE_ENABLED", "false")
    assert quickstart.main(["--no_such_input", "1"]) != 0

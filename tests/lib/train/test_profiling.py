"""Laws of traces: they are of the steps that were asked for, and asking for none costs and writes nothing."""

import gzip
import json
from pathlib import Path

import torch

from lib.config.train import ProfileConfig
from lib.train.profiling import PROFILES, StepProfiler


def _run(config: ProfileConfig | None, folder: Path, steps: range) -> list[Path]:
    profiler = StepProfiler(config, folder, rank=3, device=torch.device("cpu"))
    for step in profiler.watch(steps):
        torch.ones(step, step) @ torch.ones(step, step)
    return sorted(folder.rglob("*.gz"))


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    """Each step makes one product: steps 2 and 3 of 4 make two."""
    (path,) = _run(ProfileConfig(first_step=2, num_steps=2), tmp_path, range(1, 5))
    assert path == tmp_path / PROFILES / "rank-00003-steps-2-to-3.json.gz"
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        events = json.load(stream)["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2


def test_a_run_that_goes_on_within_the_steps_traces_what_is_left_of_them(tmp_path: Path) -> None:
    (path,) = _run(ProfileConfig(first_step=2, num_steps=3), tmp_path, range(4, 6))
    assert path.name == "rank-00003-steps-4-to-4.json.gz"


def test_nothing_is_written_unasked(tmp_path: Path) -> None:
    assert _run(None, tmp_path, range(1, 4)) == [] and not (tmp_path / PROFILES).exists()

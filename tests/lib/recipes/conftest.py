"""A tiny model, its logit report and a small data set, as artifacts; and a way to train on them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lib.cluster.group import GroupFactory
from lib.cluster.local import LocalGroup
from lib.config.recipes import SftJob
from lib.core.artifact import Staged, read_manifest, stage_artifact
from lib.core.manifest import Manifest
from lib.data.rows import ingest_dataset
from lib.models.admit import admit_model
from lib.models.logit_report import LogitReport
from lib.models.verify import build_logit_report
from lib.recipes.sft import run_sft
from lib.train.run import Origins, RunInputs
from tests.tiny import tiny_model

NUM_ROWS = 40
IN_PROCESS: GroupFactory = partial(LocalGroup, in_process=True)


@dataclass(frozen=True)
class Inputs:
    """What a run is given."""

    model: Path
    data: Path
    report: LogitReport
    resume_from: Path | None = None
    home: str | None = None
    """Address of the store that keeps the run's checkpoints; None: its folder."""
    origins: Origins | None = None


@dataclass
class Shown:
    """Records what a progress bar would show."""

    calls: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    act: Callable[[int], None] = lambda count: None

    def __call__(self, count: int, /, **figures: float | str) -> None:
        self.calls.append((count, figures))
        self.act(count)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Rows of different lengths, some with two assistant turns; a few to a packed row of 384 tokens."""
    root = tmp_path_factory.mktemp("inputs")
    with stage_artifact(root / "model", "model") as staged:
        admit_model(tiny_model(root / "source"), staged)
    rows = []
    for number in range(NUM_ROWS):
        other, hint = number * 7 % 31, " Check every step." * (number % 3)
        turns = [
            {"role": "user", "content": f"What is the sum of {number} and {other}?{hint}"},
            {"role": "assistant", "content": f"The answer is {number + other}."},
        ]
        more = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": str(number)}]
        rows.append({"id": f"row-{number}", "messages": turns + (more if number % 5 == 0 else [])})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with stage_artifact(root / "data", "dataset") as staged:
        ingest_dataset(root / "rows.jsonl", staged)
    report = build_logit_report(root / "model", num_configs=1)
    digest = read_manifest(root / "model").digest
    return Inputs(root / "model", root / "data", report.model_copy(update={"model_digest": digest}))


def job(
    *, ranks: int = 1, steps: int = 6, sequence_length: int = 384, mlflow: bool = False, **changes: dict[str, Any]
) -> SftJob:
    """Float32, a checkpoint every 2 steps, 4 rows a step; `changes` are merged into the configuration's sections."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"num_streams": 4, "open_packs": 4},
        "model": {"compute_dtype": "float32", "loss_chunk_tokens": 16},
        "optim": {"warmup_steps": 2},
        "train": {"rows_per_step": 4, "checkpoint_every": 2},
        "cluster": {"cpu_ranks_per_node": ranks},
        "tracking": {"mlflow": mlflow, "experiment": "recipe"},
    }
    config = {name: {**sections.get(name, {}), **changes.get(name, {})} for name in sections | changes}
    knobs = {"learning_rate": 1e-3, "steps": steps, "sequence_length": sequence_length, "nodes": 1, "gpus_per_node": 0}
    return SftJob.parse({**knobs, "config": config}, where="test")


def train(
    inputs: Inputs,
    settings: SftJob,
    root: Path,
    *,
    run: str = "run",
    name: str = "checkpoint",
    shown: Shown | None = None,
    group_factory: GroupFactory | None = None,
) -> Manifest:
    """Run to the end; one rank runs in this process. Returns the manifest of the checkpoint at root / name."""
    factory = group_factory or (IN_PROCESS if settings.shape.num_ranks == 1 else LocalGroup)
    with stage_artifact(root / name, "checkpoint") as staged:
        fill(inputs, settings, staged, run_dir=root / run, shown=shown or Shown(), factory=factory)
    return read_manifest(root / name)


def fill(inputs: Inputs, settings: SftJob, staged: Staged, *, run_dir: Path, shown: Shown, factory: GroupFactory) -> None:
    given = RunInputs(inputs.model, inputs.data, inputs.report, run_dir, inputs.resume_from, inputs.home, inputs.origins)
    run_sft(settings, given, staged, group_factory=factory, progress=shown)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

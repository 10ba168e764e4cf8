"""Laws of looking up samples: each step's are those that it was made of, and each sample's steps are those that had it."""

import random
from pathlib import Path

import pytest

from lib.core.errors import ConfigError
from lib.train.meters import METRICS_NAME, StepLog, StepReport, report_row
from lib.train.samples import samples_of_step, steps_of_sample


@pytest.fixture
def steps() -> list[tuple[str, ...]]:
    """Ids of each step's samples: eight of thirty rows, some twice."""
    rng = random.Random(0)
    return [tuple(f"row-{rng.randrange(30)}" for _ in range(8)) for _ in range(20)]


@pytest.fixture
def run(tmp_path: Path, steps: list[tuple[str, ...]]) -> Path:
    """A run's folder with the record of those steps, and half a line of the next one."""
    log = StepLog(tmp_path / METRICS_NAME, resume_step=0)
    for step, ids in enumerate(steps, start=1):
        log.write(report_row(StepReport(step, 1.0, 1.0, 1e-5, 3, 7, 8, ids, {})))
    log.close()
    with (tmp_path / METRICS_NAME).open("a", encoding="utf-8") as stream:
        stream.write('{"step":21,"samp')
    return tmp_path


def test_what_is_looked_up_is_what_was_trained(run: Path, steps: list[tuple[str, ...]]) -> None:
    """Both ways, in the folder and in the file."""
    for number, ids in enumerate(steps, start=1):
        assert sorted(samples_of_step(run, number)) == sorted(ids)
    for sample_id in {sample_id for ids in steps for sample_id in ids} | {"row-30"}:
        expected = [number for number, ids in enumerate(steps, start=1) if sample_id in ids]
        assert steps_of_sample(run / METRICS_NAME, sample_id) == expected


def test_what_is_not_recorded_is_said(run: Path) -> None:
    for step in (0, 21):
        with pytest.raises(ConfigError, match=rf"has no step {step}; its last one is 20"):
            samples_of_step(run, step)
    with pytest.raises(ConfigError, match="no such file; name a run"):
        samples_of_step(run / "nothing", 1)

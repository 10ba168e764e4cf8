"""Which samples a step was made of, and which steps a sample was part of: read from a run's metrics.jsonl."""

import json
from collections.abc import Iterator
from pathlib import Path

from lib.core.errors import ConfigError
from lib.core.manifest import Json
from lib.train.compact_ids import expand_ids
from lib.train.meters import METRICS_NAME


def samples_of_step(place: Path, step: int) -> list[str]:
    """Ids of the samples that a step was made of.

    Args:
        place: a run's folder, a checkpoint that came of it, or its metrics.jsonl.
    Raises:
        ConfigError: nothing is recorded there, or not of that step.
    """
    last = 0
    for row in _rows(place):
        last = row["step"]
        if last == step:
            return expand_ids(row["samples"])
    raise ConfigError(f"{place}: has no step {step}; its last one is {last}")


def steps_of_sample(place: Path, sample_id: str) -> list[int]:
    """Steps that a sample was part of; none if it never was. Place and errors as of `samples_of_step`."""
    return [row["step"] for row in _rows(place) if sample_id in expand_ids(row["samples"])]


def _rows(place: Path) -> Iterator[Json]:
    path = place / METRICS_NAME if place.is_dir() else place
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; name a run's folder or a checkpoint, which have a {METRICS_NAME}")
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):  # a last one without is still being written
                yield json.loads(line)

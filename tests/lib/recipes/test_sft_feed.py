"""What the inspection shows is what the recipe trains on."""

import json
from pathlib import Path
from typing import Any

import pytest

from lib.train import loop
from tasks.inspect import main
from tests.lib.recipes.conftest import Inputs, job, train


def test_inspected_rows_are_those_that_the_recipe_feeds(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value of every row of each step, for one seed and number of streams; recorded where the recipe hands the batch
    to the optimizer step, which then goes on as ever."""
    fed: list[dict[str, Any]] = []
    step = loop.train_step

    def recording(training: Any, micro_batches: Any, counts: Any, **rest: Any) -> Any:
        for batch in (micro.batch for micro in micro_batches):
            names = ("token_ids", "labels", "positions", "document_ids")
            for row in range(len(batch.token_ids)):
                values = {name: getattr(batch, name)[row].tolist() for name in names}
                fed.append({**values, "sample_ids": list(batch.sample_ids[row]), "step": rest["step"]})
        return step(training, micro_batches, counts, **rest)

    monkeypatch.setattr(loop, "train_step", recording)
    train(inputs, job(steps=4, data={"seed": 5}), tmp_path)
    flags = ["--sequence-length", "384", "--seed", "5", "--num-streams", "4", "--rows-per-step", "4", "--rows", "16"]
    source = ["--data", str(inputs.data.parent / "rows.jsonl"), "--model", str(inputs.model)]
    (tmp_path / "config.yaml").write_text("config: {data: {open_packs: 4}}\n", encoding="utf-8")
    config = ["--config", str(tmp_path / "config.yaml")]
    assert main(["pack", *config, *source, *flags, "--out", str(tmp_path / "x.jsonl")]) == 0
    shown = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{name: row[name] for name in fed[0]} for row in shown] == fed

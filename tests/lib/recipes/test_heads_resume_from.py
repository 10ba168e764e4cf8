"""Laws of going on from a finished run's checkpoint with heads: as if it had never ended, and only with the same heads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lib.config.recipes import HeadsJob
from lib.core.errors import ConfigError, ModelError, UserError
from lib.core.manifest import Manifest
from tests.lib.recipes.conftest import Inputs, job, metrics
from tests.lib.recipes.conftest import train as train_sft
from tests.lib.recipes.test_heads import HEADS, Labelled, heads_job, train
from tests.lib.recipes.test_heads import labelled as labelled

FLAT = {"warmup_steps": 0, "final_fraction": 1.0}
"""A learning rate that doesn't depend on where a run ends."""


def flat_job(steps: int, heads: list[dict[str, Any]] = HEADS) -> HeadsJob:
    return heads_job(heads=heads, steps=steps, optim=FLAT)


@pytest.fixture(scope="module")
def short(inputs: Inputs, labelled: Labelled, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    root = tmp_path_factory.mktemp("short")
    return root / "checkpoint", train(inputs, labelled.data, flat_job(2), root)


def test_a_run_that_goes_on_is_the_run_that_never_ended(
    short: tuple[Path, Manifest], inputs: Inputs, labelled: Labelled, tmp_path: Path
) -> None:
    """[F5] 2 steps, and 2 more from their checkpoint in a new run: weights, heads and all metrics are those of 4 steps."""
    whole = train(inputs, labelled.data, flat_job(4), tmp_path, run="run-whole", name="whole")
    first = train(replace(inputs, resume_from=short[0]), labelled.data, flat_job(4), tmp_path)
    for found in (first, whole):
        assert found.meta["heads"] == [head["name"] for head in HEADS]
    heads = "hf/heads/heads.safetensors"
    assert first.meta["weights_digest"] == whole.meta["weights_digest"]
    assert (tmp_path / "checkpoint" / heads).read_bytes() == (tmp_path / "whole" / heads).read_bytes()
    assert (short[0] / heads).read_bytes() != (tmp_path / "whole" / heads).read_bytes()
    assert metrics(tmp_path / "checkpoint") == metrics(tmp_path / "whole")
    assert first.lineage["resume_from"] == short[1].digest and "resume_from" not in whole.lineage


def test_other_heads_are_refused(short: tuple[Path, Manifest], inputs: Inputs, labelled: Labelled, tmp_path: Path) -> None:
    """Labels in another order would fit in shape; so would a head that is left out, whose weights would be lost. Another weight
    of a head is the new run's affair, as a learning rate is; another loss would report other figures than the steps before."""
    onward = replace(inputs, resume_from=short[0])
    squared = [{**head, "loss": "squared_error"} if head["name"] == "clicked" else head for head in HEADS]
    turned = [{**head, "labels": head["labels"][::-1]} if "labels" in head else head for head in HEADS]
    for heads, words in (
        (turned, r"head 'topic' is classification by document of \['small', .*in this run .*\['none', "),
        (squared, r"'clicked' is scalar by document with logistic, in this run scalar by document with squared_error"),
        (
            HEADS[:-1],
            r"head 'worth' is scalar by token with squared_error, in this run not there; give config\.heads as they were",
        ),
        ([*HEADS, {"name": "more", "kind": "scalar"}], r"head 'more' is not there, in this run scalar by document"),
    ):
        with pytest.raises(ModelError, match=words):
            train(onward, labelled.data, flat_job(4, heads), tmp_path, run="other")
    with pytest.raises(ConfigError, match="has 2 steps behind it and the run ends after 2; raise steps"):
        train(onward, labelled.data, flat_job(2), tmp_path, run="ended")
    with pytest.raises(UserError, match="expected a 'checkpoint'"):
        train(replace(inputs, resume_from=inputs.model), labelled.data, flat_job(4), tmp_path, run="model")
    train(onward, labelled.data, flat_job(3, [{**head, "weight": 2.0} for head in HEADS]), tmp_path, run="weight")


def test_a_checkpoint_of_the_next_token_alone_is_refused(
    short: tuple[Path, Manifest], inputs: Inputs, labelled: Labelled, tmp_path: Path
) -> None:
    """And one with heads where none are trained."""
    train_sft(inputs, job(steps=2, optim=FLAT), tmp_path, run="run-sft", name="sft")
    with pytest.raises(ModelError, match="'clicked' is not there, in this run scalar by document"):
        train(replace(inputs, resume_from=tmp_path / "sft"), labelled.data, flat_job(4), tmp_path)
    with pytest.raises(ModelError, match=r"the run needs model/weight/decoder\.embed\.weight .* the checkpoint holds none"):
        train_sft(replace(inputs, resume_from=short[0]), job(steps=4, optim=FLAT), tmp_path, run="run-heads", name="bare")

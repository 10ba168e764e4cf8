"""A run on ranks that compute each layer together is the run of one rank, and any mesh goes on where another was."""

import shutil
from pathlib import Path

import pytest

from lib.core.errors import ConfigError
from tests.lib.recipes.conftest import Inputs, job, metrics, train
from tests.lib.recipes.test_sft import _same


@pytest.mark.timeout(600)
def test_a_cut_model_trains_as_one_rank_and_another_mesh_goes_on(inputs: Inputs, tmp_path: Path) -> None:
    """[E3] [E8] Two ranks on each layer: the same samples in every step, each counted once, and losses to 1e-5.

    And two ranks with rows of their own go on from the checkpoint of step 4, where both had the same: a rank's number says
    nothing of its rows on another mesh.
    """
    train(inputs, job(), tmp_path, run="run-one", name="one")
    one = metrics(tmp_path / "one")
    train(inputs, job(ranks=2, parallel={"tensor": 2}), tmp_path, run="run", name="tensor")
    _same(one, metrics(tmp_path / "tensor"))
    for name in ("num_tokens", "num_targets", "num_slots"):
        assert [row[name] for row in metrics(tmp_path / "tensor")] == [row[name] for row in one]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    train(inputs, job(ranks=2), tmp_path, run="run", name="went-on")
    _same(one, metrics(tmp_path / "went-on"))


def test_a_mesh_that_does_not_fit_the_model_is_refused_before_any_rank_starts(inputs: Inputs, tmp_path: Path) -> None:
    """[I6] The tiny model has two key-value heads."""

    def start(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("no rank may start")

    settings = job(ranks=4, parallel={"tensor": 4})
    with pytest.raises(ConfigError, match=r"config\.parallel\.tensor is 4, which doesn't divide the model's 2 key-value heads"):
        train(inputs, settings, tmp_path, group_factory=start)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()

"""Experts dealt out over ranks are experts on one: the same bits forward, the same gradients, balance and state."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lib.models.hf_io import CheckpointReader
from tests.lib.models.checkpoints import family_model
from tests.lib.parallel.expert_work import JOBS, MODELS, everything, key_of
from tests.lib.parallel.ranks import run_here, run_ranks

KEYS = [f"{name} {key_of(num_ranks, plan)}" for num_ranks in (2, 4) for name, plan, _ in JOBS[num_ranks]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    for name in MODELS:
        family_model(root / name, name.removesuffix("_adapters"))
    return root


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Key -> what each rank saw."""
    found: dict[str, list[dict[str, Any]]] = {}
    for num_ranks in JOBS:
        ranks = run_ranks(everything, num_ranks, root) if num_ranks > 1 else [run_here(everything, root)]
        found |= {key: [rank[key] for rank in ranks] for key in ranks[0]}
    return found


def reference(key: str) -> str:
    """The key of the same model on one rank."""
    return f"{key.split(maxsplit=1)[0]} {key_of(1, {})}"


@pytest.mark.parametrize("key", KEYS)
def test_each_rank_reads_its_experts_and_all_of_them_are_the_model(
    key: str, root: Path, results: dict[str, list[dict[str, Any]]]
) -> None:
    """Bit for bit, and at most 1.1 times a rank's share of the bytes: copies of the model read it once each."""
    reader = CheckpointReader(root / key.split(maxsplit=1)[0])
    total = sum(reader.get(name).nbytes for name in reader.names())
    assert all(reader.get(name).any() for name in reader.names() if "bias" in name)
    share = total * (2 if "replicate2" in key else 1) / len(results[key])
    for rank in results[key]:
        assert rank["not_as_stored"] == []
        assert rank["bytes_read"] <= 1.1 * share


@pytest.mark.parametrize("key", KEYS)
def test_rows_come_back_from_their_experts_with_the_same_bits(key: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """[B1] As of a decoder of one's own that sees no row of another rank."""
    assert [rank["hidden_differ"] for rank in results[key]] == [0] * len(results[key])


@pytest.mark.parametrize("key", KEYS)
def test_loss_and_every_gradient_are_those_of_one_rank(key: str, root: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """[E3] To 1e-5: routers, biases that are not zero, and losses of balance over all ranks' tokens among them; clipped to one
    norm."""
    expected = results[reference(key)][0]
    for rank in results[key]:
        for name, value in expected["first"].items():
            assert rank["first"][name] == pytest.approx(value, rel=1e-5), name
        assert rank["norm"] == results[key][0]["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        assert rank["clipped"] == pytest.approx(0.1, rel=1e-4)
    found, theirs = (load_file(root / name / "gradients.safetensors") for name in (key, reference(key)))
    assert found.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
        assert gradient.any(), name


@pytest.mark.parametrize("key", KEYS)
def test_a_run_is_the_run_of_one_rank(key: str, root: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """Losses of steps, and weights after them; [E2] the bias of balance is not zero and the same everywhere."""
    expected = results[reference(key)][0]
    for rank in results[key]:
        for ours, theirs in zip(rank["steps"], expected["steps"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    found, theirs = (load_file(root / name / "state.safetensors") for name in (key, reference(key)))
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.startswith("buffer/"):
            assert tensor.any() and torch.equal(found[name], tensor), name
        elif name.startswith("weight/"):
            assert (found[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), name


def test_a_checkpoint_is_gone_on_from_with_experts_dealt_otherwise(results: dict[str, list[dict[str, Any]]]) -> None:
    """[F9, E2] From 2 ranks to 4 and to 1, and from 4 to 1: weights, moments, step counts and biases to the bit; then the next
    loss to 1e-6."""
    resumed = [key for key in results if " from " in key]
    assert len(resumed) == 5
    for key in resumed:
        for rank in results[key]:
            saved = results[f"{key.split()[0]} {key.partition(' from ')[2]}"][0]
            assert rank["wrong"] == []
            assert rank["next"] == pytest.approx(saved["next"], rel=1e-6), key


def test_one_product_for_all_experts_of_a_rank_is_each_by_itself(results: dict[str, list[dict[str, Any]]]) -> None:
    """Rows that came from several ranks are sorted by expert first, as GPUs need it; output and gradients to rounding."""
    for rank in results["one product"]:
        assert max(rank.values()) <= 1e-5, rank

"""N ranks are one rank: weights, losses, gradients, norms and exports of a sharded model are those of a whole one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lib.models.decoder import Decoder
from lib.models.hf_io import CheckpointReader, load_full, read_spec
from lib.models.lora import fill_factors, put_adapters
from lib.parallel.load import full_tensors
from lib.parallel.reduce import all_reduce_sum, barrier, clip_grad_norm
from tests.lib.models.checkpoints import family_model
from tests.lib.parallel.load_memory import folder_of, load
from tests.lib.parallel.ranks import run_here, run_ranks
from tests.lib.parallel.work import CASES, LossModule, digest, everything, share, shift_adapters
from tests.tiny import VOCAB_SIZE, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sharding")
    folders = {case: root / str(number) for number, case in enumerate(CASES)}
    for case, (_, overrides) in CASES.items():
        (family_model if "family" in overrides else tiny_model)(folders[case], **overrides)
    return folders


@pytest.fixture(scope="module")
def one_rank(folders: dict[str, Path]) -> dict[str, Any]:
    result: dict[str, Any] = run_here(everything, folders)
    return result


@pytest.fixture(scope="module")
def two_ranks(folders: dict[str, Path]) -> list[dict[str, Any]]:
    return run_ranks(everything, 2, folders)


def plain(folder: Path, case: str) -> LossModule:
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    if lora := CASES[case][0].get("lora"):
        put_adapters(decoder, lora)
        fill_factors(decoder, seed=0)
        shift_adapters(decoder)
    return LossModule(decoder)


def relative(ours: Any, theirs: Any) -> float:
    """Greatest difference in units of the greatest |value|."""
    ours, theirs = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_load_is_the_full_load(case: str, folders: dict[str, Path], two_ranks: list[dict[str, Any]]) -> None:
    """Bit for bit, and each rank reads at most 1.1 times its share of the bytes."""
    expected = {name: digest(tensor) for name, tensor in plain(folders[case], case).decoder.named_parameters()}
    reader = CheckpointReader(folders[case])
    total = sum(reader.get(name).nbytes for name in reader.names())
    for rank in two_ranks:
        assert rank[case]["loaded"] == expected
        assert rank[case]["bytes_read"] <= 1.1 * total / 2


def test_a_rank_needs_the_memory_of_its_share(tmp_path: Path) -> None:
    """[F13] Four ranks load a model stored in float32: each grows by at most 1.3 of its quarter and one file of the model, with
    all that it maps. `python -m tests.campaigns load` tries larger models, other dtypes and meshes."""
    warm, folder = (folder_of(tmp_path / name, "float32", num_layers=layers) for name, layers in (("warm", 1), ("model", 16)))
    for rank in run_ranks(load, 4, str(warm), str(folder), {}):
        assert rank["share"] < rank["grown"] <= 1.3 * rank["share"] + rank["file"]


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_the_checkpoint(case: str, folders: dict[str, Path], two_ranks: list[dict[str, Any]]) -> None:
    """Whole tensors under their checkpoint names, equal to the stored ones (as float32) on every rank, after a forward pass;
    with adapters, the merged ones of a whole decoder."""
    reader = CheckpointReader(folders[case])
    stored = {name: reader.get(name).float() for name in reader.names()}
    merged = dict(full_tensors(plain(folders[case], case))) if "adapters" in case else stored
    expected = {name: digest(tensor) for name, tensor in merged.items()}
    assert all(rank[case]["exported"] == expected for rank in two_ranks)


@pytest.mark.parametrize("case", [case for case in CASES if "bf16" not in case])
def test_loss_and_gradients_do_not_depend_on_the_ranks(
    case: str, folders: dict[str, Path], one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]
) -> None:
    """Sums over all rows: a plain module, one rank and two ranks agree to 1e-5 relative. [E8] The tied gradient counts once."""
    module = plain(folders[case], case)
    loss = module(*share(1, 0, VOCAB_SIZE))
    loss.backward()
    for result in (one_rank, *two_ranks):
        assert result[case]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        trained = {name: parameter for name, parameter in module.decoder.named_parameters() if parameter.requires_grad}
        assert result[case]["gradients"].keys() == trained.keys()
        for name, parameter in trained.items():
            assert parameter.grad is not None
            assert relative(result[case]["gradients"][name], parameter.grad.tolist()) <= 1e-5, name


def test_bfloat16_gradients_agree_to_its_rounding(one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]) -> None:
    for case in ("bf16", "bf16 adapters"):
        assert two_ranks[0][case]["loss"] == pytest.approx(one_rank[case]["loss"], rel=1e-3)
        for name, gradient in one_rank[case]["gradients"].items():
            assert relative(two_ranks[0][case]["gradients"][name], gradient) <= 3e-2, name


@pytest.mark.parametrize("case", CASES)
def test_masters_and_gradients_are_float32(case: str, two_ranks: list[dict[str, Any]]) -> None:
    """[C8] Whatever the compute dtype."""
    assert all(rank[case]["dtypes"] == ["torch.float32"] for rank in two_ranks)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_norm_is_one_number(case: str, one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]) -> None:
    """The same on both ranks to the bit, equal to that of one rank, right, and 0.5 after clipping to 0.5."""
    first, second = two_ranks
    assert first[case]["norm"] == second[case]["norm"]
    assert first[case]["norm"] == pytest.approx(one_rank[case]["norm"], rel=1e-2 if "bf16" in case else 1e-5)
    squares = [torch.tensor(gradient, dtype=torch.float64).square().sum() for gradient in first[case]["gradients"].values()]
    assert first[case]["norm"] == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-6)
    assert first[case]["clipped"] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("case", ["fp32", "fp32 recomputed", "fp32 untied, biases", "fp32 adapters"])
def test_training_steps_agree(case: str, one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]) -> None:
    """[E8] After optimizer steps the weights of two ranks are those of one; a tied head has no weight of its own."""
    assert two_ranks[0][case]["trained"] == two_ranks[1][case]["trained"]
    for name, weight in one_rank[case]["trained"].items():
        assert relative(two_ranks[0][case]["trained"][name], weight) <= 1e-3, name
    assert ("lm_head.weight" in two_ranks[0][case]["trained"]) == ("untied" in case)


def test_recomputing_changes_no_bit(one_rank: dict[str, Any]) -> None:
    assert one_rank["fp32"]["gradients"] == one_rank["fp32 recomputed"]["gradients"]


def test_whole_numbers_are_summed_exactly(one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]) -> None:
    assert one_rank["fp32"]["tokens"] == 2**40
    assert {rank["fp32"]["tokens"] for rank in two_ranks} == {2**41 + 1}


def test_replicas_of_shards_give_the_same_gradients(one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]) -> None:
    """Two replicas of one shard each: the second mesh axis sums too, and the norm counts each piece once."""
    first, second = (rank["replicas"] for rank in two_ranks)
    assert first["norm"] == second["norm"] == pytest.approx(one_rank["fp32"]["norm"], rel=1e-5)
    for name, gradient in one_rank["fp32"]["gradients"].items():
        assert relative(first["gradients"][name], gradient) <= 1e-5, name


@pytest.mark.parametrize("case", ["heads", "heads, cut layers"])
def test_heads_on_two_ranks_are_those_of_one(case: str, one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]) -> None:
    """[C2] The same first weights to the bit, a head of a single row too; each head's loss is divided by the count of both.

    [E3] And where both ranks compute each layer together, what a head adds to the gradient of a hidden state counts once.
    """
    alone = one_rank["heads"]
    assert alone["gradients"].keys() >= {"headed.heads.reward_head.weight", "headed.heads.topic_head.weight"}
    for rank in two_ranks:
        found = rank[case]
        assert found["loaded"] == alone["loaded"]
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert found["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            assert relative(found["gradients"][name], gradient) <= 1e-5, name


def test_documents_do_not_see_each_other_on_two_ranks(two_ranks: list[dict[str, Any]]) -> None:
    """[B1] Exactly 0 on rank 0; rank 1, whose every token changed, is the control."""
    assert two_ranks[0]["leaks"] == 0
    assert two_ranks[1]["leaks"] > 0


def test_shared_memory_gives_the_bits_of_gloo(two_ranks: list[dict[str, Any]]) -> None:
    """Gathers of three dtypes and sums of float32, from one number to many pieces; two addends have one order of summing."""
    assert [rank["collectives"] for rank in two_ranks] == [[], []]


def test_ranks_that_cannot_share_memory_agree_to_use_sockets(two_ranks: list[dict[str, Any]]) -> None:
    """One rank whose memory can't be mapped is enough; training then gives the same bits."""
    assert [rank["unshared"] for rank in two_ranks] == [True, True]
    for rank in two_ranks:
        assert rank["sockets"]["gradients"] == rank["fp32"]["gradients"]
        assert rank["sockets"]["trained"] == rank["fp32"]["trained"]


def test_a_missing_rank_is_noticed_at_the_deadline(two_ranks: list[dict[str, Any]]) -> None:
    """Rank 1 goes away after the first barrier; rank 0 waits one second and says so."""
    assert "rank 0" in two_ranks[0]["barrier"] and "within 1 s" in two_ranks[0]["barrier"]


def test_no_gradients_have_norm_zero() -> None:
    assert clip_grad_norm([torch.zeros(2, requires_grad=True)], 1.0) == 0.0


@pytest.mark.parametrize(("gradient", "norm"), [([3.0, float("inf")], float("inf")), ([0.3, 0.4], 0.5)])
def test_nothing_is_scaled_that_should_not_be(gradient: list[float], norm: float) -> None:
    """Not finite: returned, left alone for whoever refuses the step. Below the limit: left alone."""
    weight = torch.zeros(2, requires_grad=True)
    weight.grad = torch.tensor(gradient)
    assert clip_grad_norm([weight], 1.0) == pytest.approx(norm)
    assert weight.grad.tolist() == pytest.approx(gradient)


def test_sums_and_barrier_without_a_process_group() -> None:
    assert all_reduce_sum({"a": 1, "b": 2.5}) == {"a": 1, "b": 2.5}
    barrier(1.0)

"""A model cut over ranks is the model: loss, every gradient, norm, export and updates, on any mesh, of every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lib.models.hf_io import CheckpointReader
from tests.lib.models.checkpoints import family_model
from tests.lib.parallel.cut import CASES, compute
from tests.lib.parallel.ranks import run_here, run_ranks

TWO: list[dict[str, int]] = [{"tensor": 2}]
FOUR: list[dict[str, int]] = [{"tensor": 4}, {"tensor": 2}, {"replicate": 2}, {"replicate": 2, "tensor": 2}]
"""On four ranks: on each layer all, two with two pieces, two copies of two pieces, and two copies of two on each layer."""
ON_FOUR = ["llama", "gpt_oss"]

Found = tuple[list[dict[str, Any]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("cut")
    return {case: str(family_model(root / case, **fields)) for case, (_, fields) in CASES.items()}


@pytest.fixture(scope="module")
def results(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """Ranks, case and mesh -> what each rank found, and the whole tensors."""
    found: dict[str, Found] = {}
    wide = {case: folders[case] for case in ON_FOUR}
    for num_ranks, meshes, cases in ((1, [{}], folders), (2, TWO, folders), (4, FOUR, wide)):
        out = tmp_path_factory.mktemp(f"ranks-{num_ranks}")
        given = (cases, meshes, str(out))
        run = [run_here(compute, *given)] if num_ranks == 1 else run_ranks(compute, num_ranks, *given)
        for name in run[0]:
            found[f"{num_ranks} {name}"] = ([rank[name] for rank in run], load_file(out / f"{name}.safetensors"))
    return found


CUT = [(case, f"2 {case} {mesh}") for case in CASES for mesh in TWO] + [
    (case, f"4 {case} {mesh}") for case in ON_FOUR for mesh in FOUR
]


@pytest.mark.parametrize(("case", "name"), CUT)
def test_a_cut_model_is_the_model(case: str, name: str, results: dict[str, Found]) -> None:
    """[E3] [E8] Loss and every gradient to 1e-5, of its greatest entry; biases, sinks and norms are not zero. The exports
    are bit for bit those of one rank, and the norm, clipped to 0.5 or not, and the loss after an update are the same. What
    several ranks hold whole, and each updates for itself, has the same bits on all of them."""
    (alone,), expected = results[f"1 {case} {{}}"]
    ranks, found = results[name]
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.startswith("export/"):
            assert torch.equal(found[key], tensor), key
        else:
            assert (found[key] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), key
            assert tensor.abs().max() > 0, key
    for rank in ranks:
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert rank["correct"] == alone["correct"]
        assert rank["norm"] == ranks[0]["norm"] == pytest.approx(alone["norm"], rel=1e-5)
        assert rank["clipped"] == pytest.approx(0.5, rel=1e-5)
        assert rank["again"] == pytest.approx(alone["again"], rel=1e-4)
        assert rank["weights"] == ranks[0]["weights"]
    assert alone["again"] != pytest.approx(alone["loss"], rel=1e-3)


@pytest.mark.parametrize(("case", "name"), CUT)
def test_a_rank_reads_its_shard(case: str, name: str, folders: dict[str, str], results: dict[str, Found]) -> None:
    """At most 1.1 times its share of the bytes, although norms and routers are read by all ranks of a layer."""
    reader = CheckpointReader(Path(folders[case]))
    total = sum(reader.get(stored).nbytes for stored in reader.names())
    ranks, _ = results[name]
    num_replicas = 2 if "replicate" in name else 1
    for rank in ranks:
        assert rank["bytes_read"] <= 1.1 * total * num_replicas / len(ranks)

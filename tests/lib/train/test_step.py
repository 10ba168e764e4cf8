"""When ranks sum up their gradients changes what a rank holds, and rounding; it is one order of summing, always the same.

That both choices give the gradients of one process on any cut is in tests/numerics/test_invariance.py.
"""

from typing import Any

import pytest

from tests.lib.parallel.ranks import run_here, run_ranks
from tests.lib.train.step_traffic import NUM_MICRO_BATCHES, TRAFFIC_MESHES, traffic
from tests.lib.train.step_work import CHOICES, MESHES, everything

KEYS = [(num_ranks, f"{name} {mesh}") for num_ranks, meshes in MESHES.items() for name, mesh in meshes]


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[str, Any]]]:
    """Number of ranks -> what each of them found."""
    return {count: [run_here(everything)] if count == 1 else run_ranks(everything, count) for count in MESHES}


@pytest.mark.parametrize(("num_ranks", "key"), KEYS)
def test_gradients_are_summed_in_one_order(num_ranks: int, key: str, results: dict[int, list[dict[str, Any]]]) -> None:
    """[C3] The same bits every time. Summed up each time they are, to the bit, those of the micro-batches one by one, each
    over all ranks, added up in their order; on copies of the model, where copies are summed up last, and on one rank, where
    there is nothing to sum over, both choices are what the ranks' or the copy's own sum is."""
    for rank in results[num_ranks]:
        found = rank[key]
        for choice in CHOICES:
            assert len(set(found[choice])) == 1
        if "replicate" not in key:
            assert found["each_micro_batch"][0] == found["one by one"]
    if num_ranks == 1:
        assert found["each_step"] == found["each_micro_batch"]


@pytest.mark.parametrize(("num_ranks", "key"), KEYS)
def test_summed_up_each_time_a_rank_holds_its_pieces(
    num_ranks: int, key: str, results: dict[int, list[dict[str, Any]]]
) -> None:
    """What the choice frees, in bytes of live tensors when the second micro-batch begins, is what the memory model says: the
    difference of whole gradients and a rank's pieces of them, which is nothing where a rank has all pieces."""
    for rank in results[num_ranks]:
        found = rank[key]
        assert found["freed"] == found["predicted"]
        assert (found["predicted"] > 0) == (found["num_pieces"] > 1)


@pytest.mark.parametrize(("num_ranks", "key"), KEYS)
def test_steps_on_ranks_are_steps_alone(num_ranks: int, key: str, results: dict[int, list[dict[str, Any]]]) -> None:
    """[C1] [C2] [E8] Eight rows with 1 to 60 targets, one in a micro-batch: after five clipped updates in float64 the weights
    of the ranks together are those of a plain module to 1e-9. Where the head is the embedding it has no weight of its own."""
    assert max(rank[key]["apart"] for rank in results[num_ranks]) <= 1e-9


@pytest.mark.parametrize("num_ranks", TRAFFIC_MESHES)
def test_no_transfer_is_made_twice(num_ranks: int) -> None:
    """Collectives of a step with M = 3 micro-batches, G = 3 groups of weights (two layers, and what is around them):

    - each group is gathered for each micro-batch, M G;
    - its gradients' pieces are summed where they belong, M G or, when whole gradients are kept until the last one, G;
    - copies are summed once a step, G, whichever is chosen: in each micro-batch they would give the same gradients;
    - sums of numbers: before the step, after it, the lengths of the sample ids and, where there are pieces, the norm;
    - the sample ids of all ranks.

    Through shared memory, a gather or a sum that fits a slot is one barrier. A group of one rank has nothing to move.
    """
    results = run_ranks(traffic, num_ranks)
    for found in results:
        for key, step in found.items():
            copies = 2 if "replicate" in key else 1
            gathers = NUM_MICRO_BATCHES * step["groups"]
            scatters = gathers if "each_micro_batch" in key else step["groups"]
            if num_ranks == copies:
                gathers = scatters = 0
            through_memory = "shared memory" in key
            expected = {
                "gather": 0 if through_memory else gathers,
                "scatter": 0 if through_memory else scatters,
                "barrier": gathers + scatters if through_memory else 0,
                "sum": 3 + (copies > 1) * step["groups"] + (num_ranks > copies),
                "lists": 1,
            }
            assert step["groups"] == 3
            assert step["counts"] == {kind: count for kind, count in expected.items() if count}, key

"""Which ranks share what: a function of the sizes alone."""

import pytest

from lib.config.parallel import ParallelConfig
from lib.parallel.mesh import DataPlace


def test_all_ranks_share_one_copy_by_default() -> None:
    assert ParallelConfig().sizes(8) == {"replicate": 1, "shard": 8, "expert": 1, "context": 1, "tensor": 1}


def test_what_is_left_is_sharded() -> None:
    """64 nodes of 8: 2 copies, each over 32 nodes, 8 ranks of a node on each layer."""
    sizes = ParallelConfig(replicate=2, tensor=8).sizes(512)
    assert sizes == {"replicate": 2, "shard": 32, "expert": 1, "context": 1, "tensor": 8}


@pytest.mark.parametrize(
    ("parallel", "num_ranks"),
    [({"tensor": 3}, 8), ({"replicate": 4}, 2), ({"shard": 2}, 8), ({"shard": 4, "tensor": 4}, 8), ({"tensor": 8}, 4)],
)
def test_sizes_must_make_the_ranks(parallel: dict[str, int], num_ranks: int) -> None:
    name, size = next(iter(parallel.items()))
    with pytest.raises(ValueError, match=rf"config\.parallel: .*{name} {size}.* doesn't make {num_ranks} ranks"):
        ParallelConfig(**parallel).sizes(num_ranks)


def test_ranks_of_a_tensor_group_have_the_same_rows() -> None:
    """2 copies x 2 pieces x 2 on each layer: four places, neighbours share one, and the first of each is counted."""
    parallel = ParallelConfig(replicate=2, tensor=2)
    places = [DataPlace.of(rank, 8, parallel) for rank in range(8)]
    assert [place.rank for place in places] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [place.is_first for place in places] == [True, False] * 4
    assert {place.num_ranks for place in places} == {parallel.num_data_ranks(8)} == {4}


def test_experts_and_replicas_have_rows_of_their_own() -> None:
    parallel = ParallelConfig(replicate=2, expert=2)
    assert [DataPlace.of(rank, 8, parallel).rank for rank in range(8)] == list(range(8))

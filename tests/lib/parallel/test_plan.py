"""What a model can't be cut into is refused before anything starts."""

from dataclasses import replace

import pytest

from lib.config.parallel import ParallelConfig
from lib.core.errors import ConfigError
from lib.models.spec import DecoderSpec, MoeSpec, Rope
from lib.parallel.plan import check_plan

DENSE = DecoderSpec("llama", 97, 48, 64, 2, 4, 2, 12, 64, Rope(1e4), 1e-6, True)
EXPERTS = replace(DENSE, family="qwen3_moe", moe=MoeSpec((0, 1), 12, 2, 20, "softmax"))


def test_what_does_not_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config\.parallel\.tensor is 2, which is not supported; leave it out"):
        check_plan(ParallelConfig(tensor=2), 2, DENSE)


def test_a_row_is_not_split_over_ranks() -> None:
    """The reason, and what to use for long rows."""
    with pytest.raises(ConfigError, match=r"parallel\.context is 4, and a row .* keys and values .*activation_checkpointing"):
        check_plan(ParallelConfig(context=4), 8, DENSE)


@pytest.mark.parametrize(
    ("expert", "num_ranks", "spec", "words"),
    [
        (2, 2, DENSE, r"expert is 2, but the model is a llama model without experts; leave it out"),
        (2, 2, None, r"expert is 2, but the model is of no family here; leave it out"),
        (8, 8, EXPERTS, r"expert is 8, which doesn't divide the model's 12 experts; choose a divisor"),
        (2, 10, EXPERTS, r"expert is 2, which leaves 5 shards of each expert, .* hidden size of 48; choose a larger"),
        (2, 16, EXPERTS, r"expert is 2, which leaves 8 shards of each expert, .* intermediate size of 20; choose a larger"),
    ],
)
def test_experts_that_cannot_be_dealt_out_are_refused(expert: int, num_ranks: int, spec: DecoderSpec, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.parallel\.{words}"):
        check_plan(ParallelConfig(expert=expert), num_ranks, spec)


@pytest.mark.parametrize(
    ("parallel", "num_ranks"), [({"expert": 12}, 12), ({"expert": 3}, 12), ({"expert": 2, "replicate": 4}, 8)]
)
def test_what_fits_goes_through(parallel: dict[str, int], num_ranks: int) -> None:
    check_plan(ParallelConfig(**parallel), num_ranks, EXPERTS)

"""Which models can be cut in which ways: asked at the door, before any rank starts."""

from lib.config.parallel import ParallelConfig
from lib.core.errors import ConfigError
from lib.models.spec import DecoderSpec

_UNSUPPORTED = {
    "tensor": "which is not supported; leave it out, so that it is 1",
    "context": (
        "and a row of tokens can't be split over ranks: attention would need keys and values of other ranks. Leave it out; for "
        "rows that don't fit, set config.model.activation_checkpointing, a smaller config.model.loss_chunk_tokens and "
        "config.train.rows_per_micro_batch: 1, or use more ranks, over which weights and optimizer are sharded"
    ),
}


def check_plan(parallel: ParallelConfig, num_ranks: int, spec: DecoderSpec | None) -> None:
    """Refuse sizes that the model can't be cut into.

    Args:
        spec: of the model; None where it is of no family here.
    Raises:
        ConfigError: names the size, the number of the model that doesn't fit, and the remedy.
    """
    for name, reason in _UNSUPPORTED.items():
        if (size := getattr(parallel, name)) != 1:
            raise ConfigError(f"config.parallel.{name} is {size}, {reason}")
    if parallel.expert > 1:
        _check_experts(parallel.expert, parallel.sizes(num_ranks)["shard"], spec)


def _check_experts(num_ranks: int, num_shards: int, spec: DecoderSpec | None) -> None:
    asked = f"config.parallel.expert is {num_ranks}"
    if spec is None or spec.moe is None:
        kind = "of no family here" if spec is None else f"a {spec.family} model without experts"
        raise ConfigError(f"{asked}, but the model is {kind}; leave it out, and the ranks shard the weights")
    if spec.moe.num_experts % num_ranks:
        raise ConfigError(f"{asked}, which doesn't divide the model's {spec.moe.num_experts} experts; choose a divisor")
    for name, size in (("hidden size", spec.hidden_size), ("intermediate size", spec.moe.intermediate_size)):
        if size % num_shards:
            raise ConfigError(
                f"{asked}, which leaves {num_shards} shards of each expert, and they don't divide its {name} of {size}; "
                "choose a larger config.parallel.expert, or another number of ranks"
            )

"""Floating-point operations of a training step, counted from shapes: matrix products only, a multiply-add is two."""

from collections.abc import Iterable

from lib.models.spec import DecoderSpec


def flops_per_step(spec: DecoderSpec, *, num_tokens: int, num_attended_pairs: int, num_targets: int) -> int:
    """Forward and backward of one optimizer step over all ranks; the backward counts twice the forward.

    Args:
        num_tokens: tokens through the layers, without padding.
        num_attended_pairs: of all documents together, from `attended_pairs`.
        num_targets: tokens projected to the vocabulary.
    """
    products = 2 * num_tokens * sum(_weights_of_a_token(spec, layer) for layer in range(spec.num_layers))
    scores = 2 * 2 * num_attended_pairs * spec.num_heads * spec.head_dim
    head = 2 * num_targets * spec.vocab_size * spec.hidden_size
    return 3 * (products + scores + head)


def attended_pairs(spec: DecoderSpec, lengths: Iterable[int]) -> int:
    """Pairs of a query and a key that it sees, summed over the documents of these lengths and over the layers.

    A query sees its own key and those before it, as many as the layer's window allows; heads are not counted.
    """
    documents = list(lengths)
    return sum(_pairs(length, spec.window(layer) or length) for layer in range(spec.num_layers) for length in documents)


def _pairs(length: int, window: int) -> int:
    """The first `window` queries see one more key each, the others `window` keys."""
    window = min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


def _weights_of_a_token(spec: DecoderSpec, layer: int) -> int:
    """Weights of a layer that a token is multiplied with."""
    attention = spec.hidden_size * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads)
    if spec.moe is None or not spec.has_experts(layer):
        return attention + 3 * spec.hidden_size * spec.intermediate_size
    experts = spec.moe.top_k * 3 * spec.hidden_size * spec.moe.intermediate_size
    return attention + experts + spec.hidden_size * spec.moe.num_experts

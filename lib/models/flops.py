"""Floating-point operations of a training step, counted from shapes: matrix products only, a multiply-add is two."""

from lib.models.spec import DecoderSpec


def flops_per_step(spec: DecoderSpec, *, num_tokens: int, sum_sq_document_lengths: int, num_targets: int) -> int:
    """Forward and backward of one optimizer step over all ranks; the backward counts twice the forward.

    Args:
        num_tokens: tokens through the layers, without padding.
        sum_sq_document_lengths: sum over documents of length squared; a causal document costs half of its square.
        num_targets: tokens projected to the vocabulary.
    """
    attention_weights = spec.hidden_size * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads)
    mlp_weights = 3 * spec.hidden_size * spec.intermediate_size
    products = 2 * num_tokens * spec.num_layers * (attention_weights + mlp_weights)
    scores = 2 * sum_sq_document_lengths * spec.num_layers * spec.num_heads * spec.head_dim
    head = 2 * num_targets * spec.vocab_size * spec.hidden_size
    return 3 * (products + scores + head)

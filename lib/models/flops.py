"""Floating-point operations of a training step, counted from shapes: matrix products only, a multiply-add is two."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from lib.config.heads import HeadsConfig
from lib.config.model import FullTarget, LoraConfig, LoraTarget
from lib.models.lora import chosen_targets
from lib.models.spec import DecoderSpec


@dataclass(frozen=True)
class FlopCounter:
    """Counts the steps of a run.

    A matrix costs one product forward, and backward one for the gradient of its input and one for its own, each only where
    somebody wants it: a frozen matrix has no gradient of its own, and below the first thing that is trained there is no
    backward pass at all.
    """

    spec: DecoderSpec
    lora: LoraConfig | None = None
    """None: all weights are trained."""
    heads: HeadsConfig | None = None
    """Outputs beside the next token, trained whatever is frozen; None: the language model's alone."""

    def attention_products(self, lengths: Iterable[int]) -> int:
        """Products of a query with a key, or of its share with a value, forward and backward: over the documents of these
        lengths and over the layers; of one head.

        A query sees its own key and those before it, as many as the layer's window allows.
        """
        documents = list(lengths)
        return sum(
            passes * sum(attended_pairs(length, self.spec.window(layer)) for length in documents)
            for layer, passes in enumerate(self._walk.attention_passes)
        )

    def step(self, *, num_tokens: int, num_attention_products: int, num_targets: int, num_documents: int = 0) -> int:
        """Forward and backward of one optimizer step over all ranks.

        Args:
            num_tokens: tokens through the layers, without padding.
            num_attention_products: of all documents together, from `attention_products`.
            num_targets: tokens projected to the vocabulary.
            num_documents: whose last tokens go through the heads that put out one value for each.
        """
        walk, spec = self._walk, self.spec
        attention = num_attention_products * spec.num_heads * spec.head_dim
        vocabulary = num_targets * walk.of_a_target
        return 2 * (num_tokens * walk.of_a_token + attention + vocabulary + num_documents * walk.of_a_document)

    @cached_property
    def _walk(self) -> "_Walk":
        return _Walk(self.spec, self.lora, self.heads)


def attended_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees in a document: the first `window` queries see one more key each, the others
    `window` keys."""
    window = min(window or length, length)
    return window * (window + 1) // 2 + (length - window) * window


class _Walk:
    """Through the decoder as a token goes, knowing at each point whether the gradient of what comes in is wanted.

    Counts multiply-adds of a token through the layers, of a target through the head and of a document through heads of its
    own, forward and backward; and how often each layer goes through its pairs of a query and a key.
    """

    def __init__(self, spec: DecoderSpec, lora: LoraConfig | None, heads: HeadsConfig | None) -> None:
        self.of_a_token, self.of_a_target, self.of_a_document = 0, 0, 0
        self.attention_passes: list[int] = []
        self._spec, self._all = spec, lora is None
        self._targets: tuple[LoraTarget, ...] = chosen_targets(lora, spec) if lora else ()
        self._fully: tuple[FullTarget, ...] = lora.train_fully if lora else ()
        self._rank = lora.rank if lora else 0
        self._norms = self._all or "norms" in self._fully
        vocabulary: LoraTarget = "embed" if spec.tied else "head"
        wanted = self._all or "embed" in (*self._targets, *self._fully)
        if "embed" in self._targets:
            self.of_a_token += 3 * self._rank * spec.hidden_size
        for layer in range(spec.num_layers):
            wanted = self._attention(wanted)
            wanted = self._experts(wanted) if spec.has_experts(layer) else self._mlp(wanted)
        wanted = wanted or self._norms
        if spec.lm_head and (heads is None or heads.lm is not None):
            self.of_a_target = self._linear(vocabulary, spec.hidden_size, spec.num_rows, wanted)[0]
        for head in heads.outputs if heads else ():
            products = spec.hidden_size * head.num_outputs * (2 + wanted)  # a head's own weight is always trained
            self.of_a_token += products if head.by_token else 0
            self.of_a_document += 0 if head.by_token else products

    def _linear(self, name: LoraTarget | FullTarget, num_inputs: int, num_outputs: int, wanted: bool) -> tuple[int, bool]:
        """(multiply-adds, is the gradient of the output wanted) of a matrix and its adapter."""
        trained, is_adapted = self._all or name in self._fully, name in self._targets
        count = num_inputs * num_outputs * (1 + wanted + trained)
        if is_adapted:
            count += self._rank * (num_inputs * (2 + wanted) + 3 * num_outputs)
        return count, wanted or trained or is_adapted

    def _layer_linear(self, name: LoraTarget | FullTarget, num_inputs: int, num_outputs: int, wanted: bool) -> bool:
        count, wanted = self._linear(name, num_inputs, num_outputs, wanted)
        self.of_a_token += count
        return wanted

    def _attention(self, wanted: bool) -> bool:
        spec = self._spec
        query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        normed = wanted or (self._norms and spec.norm_order != "post")
        q = self._layer_linear("q", spec.hidden_size, query, normed)
        k = self._layer_linear("k", spec.hidden_size, kv, normed)
        v = self._layer_linear("v", spec.hidden_size, kv, normed)
        if spec.qk_norm != "none":
            q, k = q or self._norms, k or self._norms
        self.attention_passes.append(2 + q + k + (q or k) + v)
        o = self._layer_linear("o", query, spec.hidden_size, q or k or v)
        return wanted or o or (self._norms and spec.norm_order != "pre")

    def _mlp(self, wanted: bool) -> bool:
        size, width = self._spec.intermediate_size, self._spec.hidden_size
        normed = wanted or (self._norms and self._spec.norm_order != "post")
        gate = self._layer_linear("gate", width, size, normed)
        up = self._layer_linear("up", width, size, normed)
        down = self._layer_linear("down", size, width, gate or up)
        return wanted or down or (self._norms and self._spec.norm_order != "pre")

    def _experts(self, wanted: bool) -> bool:
        moe, width = self._spec.moe, self._spec.hidden_size
        assert moe is not None
        normed = wanted or (self._norms and self._spec.norm_order != "post")
        router = self._layer_linear("router", width, moe.num_experts, normed)
        half, inside = self._linear("experts", width, moe.intermediate_size, normed)
        whole, outside = self._linear("experts", moe.intermediate_size, width, inside)
        self.of_a_token += moe.top_k * (2 * half + whole)
        return wanted or router or outside or (self._norms and self._spec.norm_order != "pre")

"""The one decoder: embedding, layers, final norm. Knows nothing of ranks, meshes or losses.

Letters: B rows, T tokens, D model, V vocabulary, R rows of embedding and head (V and padding).
"""

import torch
from torch import nn

from lib.models.layers.attention import Attention
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.lora import AdaptedEmbedding, AdaptedLinear
from lib.models.layers.mlp import Mlp
from lib.models.layers.moe import Moe, RouterLoad
from lib.models.layers.norm import RmsNorm
from lib.models.layers.rotary import RotaryTables, rotary_tables
from lib.models.spec import DecoderSpec


class DecoderLayer(nn.Module):
    """x + attention(x), then x + mlp(x), each with a norm before it, after it, or both."""

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        norm = (spec.hidden_size, spec.norm_eps, spec.norm_offset)
        self.norm_order = spec.norm_order
        if spec.norm_order != "post":
            self.attn_norm, self.mlp_norm = RmsNorm(*norm), RmsNorm(*norm)
        if spec.norm_order != "pre":
            self.attn_post_norm, self.mlp_post_norm = RmsNorm(*norm), RmsNorm(*norm)
        self.attn = Attention(spec, layer)
        self.mlp = Moe(spec, spec.moe) if spec.moe and spec.has_experts(layer) else Mlp(spec)

    def forward(
        self, x_BTD: torch.Tensor, tables: RotaryTables, layout: DocumentLayout
    ) -> tuple[torch.Tensor, RouterLoad | None]:
        """The layer's output, and its router's load where it has experts."""
        before, after = self.norm_order != "post", self.norm_order != "pre"
        attended_BTD = self.attn(self.attn_norm(x_BTD) if before else x_BTD, tables, layout)
        x_BTD = x_BTD + (self.attn_post_norm(attended_BTD) if after else attended_BTD)
        inner_BTD, load = self.mlp_norm(x_BTD) if before else x_BTD, None
        if isinstance(self.mlp, Moe):
            inner_BTD, load = self.mlp(inner_BTD, layout)
        else:
            inner_BTD = self.mlp(inner_BTD)
        return x_BTD + (self.mlp_post_norm(inner_BTD) if after else inner_BTD), load


class Decoder(nn.Module):
    """May be built on the meta device: its only buffers are the experts' biases, zero until someone balances them."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.num_rows, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(spec, layer) for layer in range(spec.num_layers))
        self.norm = RmsNorm(spec.hidden_size, spec.norm_eps, spec.norm_offset)
        if spec.lm_head and not spec.tied:
            self.head = nn.Linear(spec.hidden_size, spec.num_rows, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        """[R, D] output projection, rows from V on without meaning; the embedding itself where tied."""
        assert self.spec.lm_head, "this decoder was built without a language-model head"
        return self.embed.weight if self.spec.tied else self.head.weight

    def head_adapter(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(x [..., L], weight [R, L]) of the head's adapter, which adds x @ weight.T to the logits of hidden [..., D]."""
        head = self.embed if self.spec.tied else self.head
        return (head.lora.shrink(hidden), head.lora.b) if isinstance(head, AdaptedEmbedding | AdaptedLinear) else None

    def forward(
        self,
        token_ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        layout: DocumentLayout,
        loads: list[RouterLoad] | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm; `logits` makes logits of them.

        Args:
            token_ids_BT: [B, T] int64.
            positions_BT: [B, T] int64 position of each token within its document.
            layout: the documents of the batch.
            loads: a list that gets the router's load of each layer with experts, in order.
        Returns:
            [B, T, D] in the dtype of the weights. Finite but without meaning on padding.
        """
        spec = self.spec
        tables = rotary_tables(spec.rope, spec.head_dim, positions_BT)
        local_tables = rotary_tables(spec.local_rope, spec.head_dim, positions_BT) if spec.local_rope else tables
        x_BTD = self.embed(token_ids_BT)
        if spec.embed_scale != 1.0:
            x_BTD = x_BTD * torch.tensor(spec.embed_scale, dtype=x_BTD.dtype, device=x_BTD.device)
        for number, layer in enumerate(self.layers):
            x_BTD, load = layer(x_BTD, tables if spec.window(number) is None else local_tables, layout)
            if loads is not None and load is not None:
                loads.append(load)
        hidden_BTD: torch.Tensor = self.norm(x_BTD)
        return hidden_BTD

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., V] logits of hidden states [..., D].

        A loss takes `head_weight`, `head_adapter`, spec.vocab_size and spec.logit_softcap instead, in chunks.
        """
        logits: torch.Tensor = hidden @ self.head_weight.T
        if adapter := self.head_adapter(hidden):
            logits = logits + adapter[0] @ adapter[1].T
        logits = logits[..., : self.spec.vocab_size]
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

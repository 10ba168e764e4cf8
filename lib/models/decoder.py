"""The one decoder: embedding, pre-norm layers, final norm. Knows nothing of ranks, meshes or losses.

Letters: B rows, T tokens, D model, V vocabulary.
"""

import torch
from torch import nn

from lib.models.layers.attention import Attention
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.mlp import Mlp
from lib.models.layers.norm import RmsNorm
from lib.models.layers.rotary import rotary_tables
from lib.models.spec import DecoderSpec


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.attn_norm = RmsNorm(spec.hidden_size, spec.norm_eps)
        self.attn = Attention(spec)
        self.mlp_norm = RmsNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = Mlp(spec)

    def forward(self, x_BTD: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], layout: DocumentLayout) -> torch.Tensor:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), tables, layout)
        output: torch.Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return output


class Decoder(nn.Module):
    """May be built on the meta device: it has parameters only, no buffers."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.num_layers))
        self.norm = RmsNorm(spec.hidden_size, spec.norm_eps)
        if not spec.tied:
            self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D] output projection; the embedding itself where tied."""
        return self.embed.weight if self.spec.tied else self.head.weight

    def forward(self, token_ids_BT: torch.Tensor, positions_BT: torch.Tensor, layout: DocumentLayout) -> torch.Tensor:
        """Hidden states after the final norm; logits are `hidden @ head_weight.T`.

        Args:
            token_ids_BT: [B, T] int64.
            positions_BT: [B, T] int64 position of each token within its document.
            layout: the documents of the batch.
        Returns:
            [B, T, D] in the dtype of the weights. Finite but without meaning on padding.
        """
        tables = rotary_tables(self.spec, positions_BT)
        x_BTD = self.embed(token_ids_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, tables, layout)
        hidden_BTD: torch.Tensor = self.norm(x_BTD)
        return hidden_BTD

"""Grouped-query attention: projections and rotary positions; who sees whom is decided by the document layout alone."""

import torch
from torch import nn

from lib.models.layers.attention_cpu import document_attention_cpu
from lib.models.layers.attention_gpu import document_attention_gpu
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.rotary import rotate
from lib.models.spec import DecoderSpec


class Attention(nn.Module):
    """Shapes: x [B, T, D] -> [B, T, D]."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q = nn.Linear(spec.hidden_size, query_size, bias=spec.attention_bias)
        self.k = nn.Linear(spec.hidden_size, kv_size, bias=spec.attention_bias)
        self.v = nn.Linear(spec.hidden_size, kv_size, bias=spec.attention_bias)
        self.o = nn.Linear(query_size, spec.hidden_size, bias=spec.attention_bias)

    def forward(self, x_BTD: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], layout: DocumentLayout) -> torch.Tensor:
        heads = (-1, self.head_dim)
        q_BTNH = rotate(self.q(x_BTD).unflatten(-1, heads), tables)
        k_BTKH = rotate(self.k(x_BTD).unflatten(-1, heads), tables)
        v_BTKH = self.v(x_BTD).unflatten(-1, heads)
        attend = document_attention_cpu if x_BTD.device.type == "cpu" else document_attention_gpu
        output: torch.Tensor = self.o(attend(q_BTNH, k_BTKH, v_BTKH, layout).flatten(2))
        return output

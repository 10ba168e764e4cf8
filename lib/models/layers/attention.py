"""Grouped-query attention: projections and rotary positions; who sees whom is decided by document layout and window alone."""

import torch
from torch import nn

from lib.models.layers.attention_cpu import document_attention_cpu
from lib.models.layers.attention_gpu import document_attention_gpu
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.norm import RmsNorm
from lib.models.layers.rotary import RotaryTables, rotate
from lib.models.layers.scores import Scores
from lib.models.spec import DecoderSpec


class Attention(nn.Module):
    """Shapes: x [B, T, D] -> [B, T, D]."""

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        self.head_dim, self.qk_norm = spec.head_dim, spec.qk_norm
        self.window, self.softcap = spec.window(layer), spec.attention_softcap
        self.scale = spec.query_scale or spec.head_dim**-0.5
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q = nn.Linear(spec.hidden_size, query_size, bias=spec.qkv_bias)
        self.k = nn.Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.v = nn.Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.o = nn.Linear(query_size, spec.hidden_size, bias=spec.o_bias)
        if spec.qk_norm != "none":
            sizes = (spec.head_dim, spec.head_dim) if spec.qk_norm == "head" else (query_size, kv_size)
            self.q_norm, self.k_norm = (RmsNorm(size, spec.norm_eps, spec.norm_offset) for size in sizes)
        if spec.sinks:
            self.sinks = nn.Parameter(torch.zeros(spec.num_heads))

    def forward(self, x_BTD: torch.Tensor, tables: RotaryTables, layout: DocumentLayout) -> torch.Tensor:
        heads = (-1, self.head_dim)
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BTNH, k_BTKH, v_BTKH = q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)
        if self.qk_norm == "head":
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = rotate(q_BTNH, tables), rotate(k_BTKH, tables)
        output: torch.Tensor = self.o(self.attend(q_BTNH, k_BTKH, v_BTKH, layout).flatten(2))
        return output

    def attend(self, q_BTNH: torch.Tensor, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, layout: DocumentLayout) -> torch.Tensor:
        """[B, T, N, H], of rotated queries and keys; zero on padding."""
        scores = Scores(self.scale, self.window, self.softcap, getattr(self, "sinks", None))
        attend = document_attention_cpu if q_BTNH.device.type == "cpu" else document_attention_gpu
        return attend(q_BTNH, k_BTKH, v_BTKH, layout, scores)

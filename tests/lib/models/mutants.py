"""One-line faults planted into the model code, one at a time, to ask whether the logit report would notice."""

import importlib
import importlib.abc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from lib.core.errors import ModelError

Mutant = tuple[str, str, str, str]
"""(family it is tried on, module below lib.models, text that is there once or more, text in its place)"""

_KEYS = """self_attn.k_proj.weight": "layers.{i}.attn.k.weight",
    "model.layers.{i}.self_attn.k_proj.bias": "layers.{i}.attn.k.bias",
    "model.layers.{i}.self_attn.v_proj.weight": "layers.{i}.attn.v.weight\""""
_GATES = """mlp.experts.{e}.gate_proj.weight": "layers.{i}.mlp.experts.gate.weight",
    "model.layers.{i}.mlp.experts.{e}.up_proj.weight": "layers.{i}.mlp.experts.up.weight\""""
_QK = "self.q_norm(q_BTNH), self.k_norm(k_BTKH)"
_ROTATED = "rotate(q_BTNH, tables), rotate(k_BTKH, tables)"
_TURNED_BEFORE = "self.q_norm(rotate(q_BTNH, tables)), self.k_norm(rotate(k_BTKH, tables))"
_GROUPED = "q_BTNH = q_BTNH.unflatten(2, (-1, k_BTKH.shape[2])).transpose(2, 3).flatten(2, 3)\n        scores = Scores("

MUTANTS: dict[str, Mutant] = {
    "rope: base": ("llama", "layers.rotary", "rope.theta**exponents", "(rope.theta * 1.01) ** exponents"),
    "rope: neighbours paired": (
        "llama",
        "layers.rotary",
        "x_BTNH.float().chunk(2, dim=-1)",
        "(x_BTNH.float()[..., 0::2], x_BTNH.float()[..., 1::2])",
    ),
    "rope: turned backwards": ("llama", "layers.rotary", "(angles.sin()", "(-angles.sin()"),
    "rope: positions doubled": ("llama", "decoder", "spec.head_dim, positions_BT)", "spec.head_dim, positions_BT * 2)"),
    "rope: linear stretch ignored": ("llama", "layers.rotary", "return stretched\n", "return frequencies\n"),
    "rope: llama3 blend reversed": (
        "llama",
        "layers.rotary",
        "(1 - keep) * stretched + keep * frequencies",
        "keep * stretched + (1 - keep) * frequencies",
    ),
    "rope: keys not turned": ("llama", "layers.attention", _ROTATED, "rotate(q_BTNH, tables), k_BTKH"),
    "rope: yarn's magnitude left out": ("gpt_oss", "layers.rotary", "rope.scaling.magnitude if rope.scaling else 1.0", "1.0"),
    "rope: yarn's ramp reversed": (
        "gpt_oss",
        "layers.rotary",
        "stretched * (1 - keep) + frequencies * keep",
        "stretched * keep + frequencies * (1 - keep)",
    ),
    "rope: yarn's borders always rounded": ("gpt_oss", "layers.rotary", "if scaling.whole_channels:", "if True:"),
    "rope: local and global exchanged": (
        "gemma3_text",
        "decoder",
        "tables if spec.window(number) is None else local_tables",
        "local_tables if spec.window(number) is None else tables",
    ),
    "rope: local left out": ("gemma3_text", "gemma3", "        local_rope=local_rope,\n", ""),
    "norm: eps": ("llama", "hf_config", 'real(config, "rms_norm_eps", 1e-6)', "1e-6"),
    "norm: one norm for both": ("llama", "decoder", "self.mlp_norm(x_BTD) if before", "self.attn_norm(x_BTD) if before"),
    "norm: last one missing": (
        "llama",
        "decoder",
        "hidden_BTD: torch.Tensor = self.norm(x_BTD)",
        "hidden_BTD: torch.Tensor = x_BTD",
    ),
    "norm: offset left out": ("gemma3_text", "gemma3", "norm_offset=1.0", "norm_offset=0.0"),
    "norm: one norm after both": ("gemma3_text", "decoder", "self.mlp_post_norm(inner_BTD)", "self.attn_post_norm(inner_BTD)"),
    "norm: none after attention": (
        "gemma3_text",
        "decoder",
        "self.attn_post_norm(attended_BTD) if after else attended_BTD",
        "attended_BTD",
    ),
    "qk norm: the keys' left out": ("qwen3", "layers.attention", _QK, "self.q_norm(q_BTNH), k_BTKH"),
    "qk norm: exchanged": ("qwen3", "layers.attention", _QK, "self.k_norm(q_BTNH), self.q_norm(k_BTKH)"),
    "qk norm: after the rotation": (
        "qwen3",
        "layers.attention",
        f"q_BTNH, k_BTKH = {_QK}",
        f"(q_BTNH, k_BTKH), tables = ({_TURNED_BEFORE}), (torch.ones_like(tables[0]), torch.zeros_like(tables[1]))",
    ),
    "qk norm: of each head instead of all": (
        "olmo2",
        "layers.attention",
        "q, k = self.q_norm(q), self.k_norm(k)",
        "q, k = (torch.nn.functional.rms_norm(x.unflatten(-1, heads), heads[1:], None, norm.eps).flatten(-2) * norm.weight "
        "for x, norm in ((q, self.q_norm), (k, self.k_norm)))",
    ),
    "norm: before instead of after": ("olmo2", "olmo2", 'norm_order="post"', 'norm_order="pre"'),
    "norm: residual from after it": ("olmo2", "decoder", "return x_BTD + (self", "return self.mlp_post_norm(x_BTD) + (self"),
    "bias: of the queries left out": ("qwen2", "qwen2", "qkv_bias=True", "qkv_bias=False"),
    "heads: groups interleaved": ("llama", "layers.attention", "scores = Scores(", _GROUPED),
    "heads: head_dim ignored in the config": (
        "llama",
        "hf_config",
        'integer(config, "head_dim", head_dim or hidden_size // num_heads)',
        "hidden_size // num_heads",
    ),
    "mask: future seen": ("llama", "layers.blocks", "(keys <= queries)", "(keys <= queries + 1)"),
    "mask: documents joined": (
        "llama",
        "layers.documents",
        "ids[position] == ids[start]:",
        "min(ids[position], ids[start]) >= 0:",
    ),
    "mask: neighbours of a block joined": (
        "llama",
        "layers.blocks",
        "(number[queries - group_start] == number[keys - group_start])",
        "(number[queries - group_start] >= 0)",
    ),
    "mask: last token of each document left out": (
        "llama",
        "layers.documents",
        "Span(row, start, position)",
        "Span(row, start, position - 1)",
    ),
    "window: one key too many": ("qwen3", "layers.blocks", "keys > queries - window", "keys >= queries - window"),
    "window: one key too few": (
        "qwen3",
        "layers.attention",
        "self.softcap = spec.window(layer), ",
        "self.softcap = spec.window(layer) and max(1, spec.window(layer) - 1), ",
    ),
    "window: a block begins one key late": ("qwen3", "layers.blocks", "start - window + 1)", "start - window + 2)"),
    "window: ignored": ("qwen3", "qwen3", '        windows=qwen_windows(config, numbers["num_layers"]),\n', ""),
    "window: from one layer later on": ("qwen3", "hf_config", "layer >= first", "layer > first"),
    "window: in the first layer only": (
        "mistral",
        "mistral",
        '(window,) * numbers["num_layers"]',
        '(window, *[None] * (numbers["num_layers"] - 1))',
    ),
    "window: pattern swapped": ("gemma3_text", "gemma3", "bool((layer + 1) % every)", "not (layer + 1) % every"),
    "window: pattern shifted": ("gemma3_text", "gemma3", "(layer + 1) % every", "layer % every"),
    "window: layer types ignored": ("gemma3_text", "hf_config", 'config.get("layer_types")', "None"),
    "window: in the other half of the layers": ("gpt_oss", "gpt_oss", "layer % 2 == 0", "layer % 2 == 1"),
    "scale: hidden size instead of head": ("llama", "layers.attention", "spec.head_dim**-0.5", "spec.hidden_size**-0.5"),
    "scale: head instead of the config's": (
        "gemma3_text",
        "gemma3",
        'real(config, "query_pre_attn_scalar", 256) ** -0.5',
        'numbers["head_dim"] ** -0.5',
    ),
    "sinks: sign": ("gpt_oss", "layers.attention_cpu", "= scores.sinks_N.to(", "= -scores.sinks_N.to("),
    "sinks: left out": ("gpt_oss", "layers.attention", 'getattr(self, "sinks", None)', "None"),
    "sinks: of the neighbouring head": (
        "gpt_oss",
        "layers.attention_cpu",
        "scores.sinks_N.to(weights_KGQE.dtype).view",
        "scores.sinks_N.to(weights_KGQE.dtype).roll(1).view",
    ),
    "sinks: scaled as scores are": (
        "gpt_oss",
        "layers.attention_cpu",
        "scores.sinks_N.to(weights_KGQE.dtype).view",
        "(scores.scale * scores.sinks_N.to(weights_KGQE.dtype)).view",
    ),
    "head: tied where it is not": ("llama", "hf_config", 'boolean(config, "tie_word_embeddings", tied)', "True"),
    "head: cap left out": ("gemma3_text", "decoder", "logits if cap is None else ", "logits if True else "),
    "head: cap on one side only": ("gemma3_text", "decoder", "cap * torch.tanh(logits / cap)", "torch.tanh(logits / cap)"),
    "embedding: scale left out": ("gemma3_text", "gemma3", 'numbers["hidden_size"] ** 0.5', "1.0"),
    "mlp: gate and up exchanged": ("llama", "layers.mlp", "silu(gate) * up", "silu(up) * gate"),
    "mlp: gelu": ("llama", "layers.mlp", "nn.functional.silu(", "nn.functional.gelu("),
    "mlp: gelu without tanh": ("gemma3_text", "layers.mlp", 'approximate="tanh"', 'approximate="none"'),
    "gate: alpha left out": ("gpt_oss", "layers.mlp", "torch.sigmoid(kind.alpha * gate)", "torch.sigmoid(gate)"),
    "gate: up not cut": ("gpt_oss", "layers.mlp", "up.clamp(-kind.limit, kind.limit)", "up"),
    "gate: cut on both sides": ("gpt_oss", "layers.mlp", "gate.clamp(max=kind.limit)", "gate.clamp(-kind.limit, kind.limit)"),
    "gate: up without its one": ("gpt_oss", "layers.mlp", "(up + 1)", "up"),
    "router: half of its gradient": (
        "qwen3_moe",
        "layers.moe",
        "weights_NC = scores_NE.gather(-1, experts_NC)",
        "weights_NC = scores_NE.lerp(scores_NE.detach(), 0.5).gather(-1, experts_NC)",
    ),
    "sinks: without gradient": ("gpt_oss", "layers.attention", 'getattr(self, "sinks", None)', "self.sinks.detach()"),
    "documents: a trace of all in each": (
        "llama",
        "decoder",
        "hidden_BTD: torch.Tensor = self.norm(x_BTD)",
        "hidden_BTD: torch.Tensor = self.norm(x_BTD) + 1e-6 * x_BTD.mean()",
    ),
    "router: chosen weights not divided": ("qwen3_moe", "qwen3_moe", '"softmax_renormalised" if', '"softmax" if'),
    "router: always divided": ("qwen3_moe", "qwen3_moe", 'else "softmax"', 'else "softmax_renormalised"'),
    "router: least probable": ("qwen3_moe", "layers.moe", "self.moe.top_k, dim=-1)", "self.moe.top_k, dim=-1, largest=False)"),
    "router: one expert fewer": ("qwen3_moe", "layers.moe", ".topk(self.moe.top_k,", ".topk(max(1, self.moe.top_k - 1),"),
    "router: bias ignored": ("gpt_oss", "layers.moe", "self.router(x_ND)", "nn.functional.linear(x_ND, self.router.weight)"),
    "router: softmax over all": ("gpt_oss", "gpt_oss", 'weights="softmax_of_chosen"', 'weights="softmax"'),
    "experts: outputs to other tokens": ("qwen3_moe", "layers.moe", "order_P.argsort()", "order_P"),
    "experts: every layer but the right ones": ("qwen3_moe", "qwen3_moe", "(layer + 1) % step == 0", "layer % step == 0"),
    "experts: in lexicographic order": (
        "qwen3_moe",
        "weights",
        "range(spec.moe.num_experts if spec.moe else 0)",
        "sorted(range(spec.moe.num_experts if spec.moe else 0), key=str)",
    ),
    "experts: bias of the first for all": ("gpt_oss", "layers.experts", "biases[expert])", "biases[0])"),
    "bias: queries', keys' and values' left out": ("llama", "llama", "qkv_bias=attention_bias", "qkv_bias=False"),
    "bias: the output's left out": ("llama", "llama", "o_bias=attention_bias", "o_bias=False"),
    "residual: attention's left out": ("llama", "decoder", "x_BTD = x_BTD + (self", "x_BTD = (self"),
    "residual: around the norm": (
        "llama",
        "decoder",
        "return x_BTD + (self.mlp_post_norm",
        "return self.mlp_norm(x_BTD) + (self.mlp_post_norm",
    ),
    "names: keys and values exchanged": (
        "llama",
        "llama",
        _KEYS,
        _KEYS.replace("attn.k.weight", "attn.?").replace("attn.v.weight", "attn.k.weight").replace("attn.?", "attn.v.weight"),
    ),
    "names: gates and ups of experts exchanged": (
        "qwen3_moe",
        "qwen3_moe",
        _GATES,
        _GATES.replace("experts.gate.", "experts.?.")
        .replace("experts.up.", "experts.gate.")
        .replace("experts.?.", "experts.up."),
    ),
    "names: gates and ups one after the other": (
        "gpt_oss",
        "weights",
        "[..., entry.part :: entry.num_parts]",
        ".chunk(entry.num_parts, -1)[entry.part]",
    ),
    "names: a layer's norm elsewhere": ("llama", "llama", '"layers.{i}.attn_norm.weight"', '"layers.{i}.mlp_norm.weight_"'),
}
"""What is wrong, in words."""


class _Planter(importlib.abc.MetaPathFinder):
    """Loads one module from altered source, and nothing else."""

    def __init__(self, name: str, path: Path, old: str, new: str) -> None:
        self.name, self.path, self.old, self.new = name, path, old, new

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, _Altered(self), origin=str(self.path)) if fullname == self.name else None


class _Altered(importlib.abc.Loader):
    def __init__(self, planter: _Planter) -> None:
        self.planter = planter

    def exec_module(self, module: ModuleType) -> None:
        path, old = self.planter.path, self.planter.old
        source = path.read_text(encoding="utf-8")
        assert old in source, f"{path}: {old!r} is gone; the mutant must follow the code"
        exec(compile(source.replace(old, self.planter.new, 1), str(path), "exec"), module.__dict__)


@contextmanager
def planted(mutant: str) -> Iterator[ModuleType]:
    """A fresh `lib.models.verify` over code with one fault; everything is as before afterwards."""
    _, module, old, new = MUTANTS[mutant]
    before = {name: value for name, value in sys.modules.items() if name.startswith("lib.models")}
    for name in before:
        del sys.modules[name]
    models = Path(__file__).resolve().parents[3] / "lib" / "models"
    planter = _Planter(f"lib.models.{module}", (models / module.replace(".", "/")).with_suffix(".py"), old, new)
    sys.meta_path.insert(0, planter)
    try:
        yield importlib.import_module("lib.models.verify")
    finally:
        sys.meta_path.remove(planter)
        for name in [name for name in sys.modules if name.startswith("lib.models")]:
            del sys.modules[name]
        sys.modules.update(before)


def is_rejected(mutant: str, *, num_configs: int = 20) -> bool:
    """Whether the random models of the report refuse the fault, by a difference or by weights that don't fit."""
    family = MUTANTS[mutant][0]
    with planted(mutant) as verify:
        for index in range(num_configs):
            try:
                if verify.compare_random(verify.random_case(family, 0, index), index).problems():
                    return True
            except (AssertionError, ModelError, RuntimeError):
                return True
    return False

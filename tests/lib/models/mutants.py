"""One-line faults planted into the model code, one at a time, to ask whether the logit report would notice."""

import importlib
import importlib.abc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

MUTANTS: dict[str, tuple[str, str, str]] = {
    "rope: base": ("layers.rotary", "spec.rope_theta**exponents", "(spec.rope_theta * 1.01) ** exponents"),
    "rope: neighbours paired": (
        "layers.rotary",
        "x_BTNH.float().chunk(2, dim=-1)",
        "(x_BTNH.float()[..., 0::2], x_BTNH.float()[..., 1::2])",
    ),
    "rope: turned backwards": ("layers.rotary", "angles.sin()", "-angles.sin()"),
    "rope: positions off by the row": ("decoder", "self.spec, positions_BT)", "self.spec, positions_BT * 2)"),
    "rope: linear stretch ignored": ("layers.rotary", "return frequencies / scaling.factor", "return frequencies"),
    "rope: llama3 blend reversed": (
        "layers.rotary",
        "(1 - keep) * stretched + keep * frequencies",
        "keep * stretched + (1 - keep) * frequencies",
    ),
    "rope: keys not turned": (
        "layers.attention",
        "rotate(self.k(x_BTD).unflatten(-1, heads), tables)",
        "self.k(x_BTD).unflatten(-1, heads)",
    ),
    "norm: eps": ("llama", 'norm_eps=_real(config, "rms_norm_eps", 1e-6)', "norm_eps=1e-6"),
    "norm: one norm for both": ("decoder", "self.mlp(self.mlp_norm(x_BTD))", "self.mlp(self.attn_norm(x_BTD))"),
    "norm: last one missing": ("decoder", "hidden_BTD: torch.Tensor = self.norm(x_BTD)", "hidden_BTD: torch.Tensor = x_BTD"),
    "heads: groups interleaved": (
        "layers.attention",
        "output: torch.Tensor = self.o(attend(q_BTNH,",
        "q_BTNH = q_BTNH.unflatten(2, (-1, k_BTKH.shape[2])).transpose(2, 3).flatten(2, 3)\n"
        "        output: torch.Tensor = self.o(attend(q_BTNH,",
    ),
    "heads: head_dim ignored in the config": (
        "llama",
        '_integer(config, "head_dim", hidden_size // num_heads)',
        "hidden_size // num_heads",
    ),
    "mask: future seen": ("layers.attention_cpu", "is_causal=True", "is_causal=False"),
    "mask: documents joined": ("layers.documents", "ids[position] == ids[start]:", "min(ids[position], ids[start]) >= 0:"),
    "mask: last token of each document left out": (
        "layers.documents",
        "Span(row, start, position)",
        "Span(row, start, position - 1)",
    ),
    "scale: hidden size instead of head": (
        "layers.attention",
        "q_BTNH = rotate(self.q(x_BTD)",
        "q_BTNH = (self.head_dim / x_BTD.shape[-1]) ** 0.5 * rotate(self.q(x_BTD)",
    ),
    "head: tied where it is not": ("llama", 'tied=_boolean(config, "tie_word_embeddings")', "tied=True"),
    "mlp: gate and up exchanged": (
        "layers.mlp",
        "nn.functional.silu(self.gate(x_BTD)) * self.up(x_BTD)",
        "nn.functional.silu(self.up(x_BTD)) * self.gate(x_BTD)",
    ),
    "mlp: gelu": ("layers.mlp", "nn.functional.silu(", "nn.functional.gelu("),
    "bias: attention's left out": ("llama", 'attention_bias=_boolean(config, "attention_bias")', "attention_bias=False"),
    "residual: attention's left out": ("decoder", "x_BTD = x_BTD + self.attn(", "x_BTD = self.attn("),
    "names: q and o exchanged": ("llama", '"layers.{i}.attn_norm.weight"', '"layers.{i}.mlp_norm.weight_"'),
}
"""What is wrong -> (module below lib.models, text that is there once or more, text in its place)."""


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
    module, old, new = MUTANTS[mutant]
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


def is_rejected(mutant: str, *, num_configs: int = 12) -> bool:
    """Whether the random models of the report refuse the fault, by a difference or by weights that don't fit."""
    with planted(mutant) as verify:
        for index in range(num_configs):
            try:
                if verify.compare_random(verify.RANDOM_CONFIGS["llama"](0, index), index).problems():
                    return True
            except (AssertionError, RuntimeError):
                return True
    return False

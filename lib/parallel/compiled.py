"""Layers and the final norm as compiled code: what lies between two matrix products becomes one pass over memory."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lib.core.errors import ConfigError
from lib.models.layers.attention import Attention
from lib.models.layers.moe import Moe

_MAX_KINDS = 64
"""Kinds of layers times shapes of batches that there may be code for; one more is an error, not a slow run."""


def compile_part(part: nn.Module, *, on_gpu: bool) -> None:
    """Have PyTorch's compiler make code of the forward and backward pass of a layer or norm when it first runs, in place.

    Layers of one kind share their code. Experts, and attention on CPU, stay as they are: their shapes depend on where
    documents lie, and there would be new code for each batch. Random numbers are those of the plain layer.

    Raises:
        ConfigError: this machine has no C++ compiler.
    """
    import torch._dynamo  # noqa: PLC0415 - takes a second, and few runs need it
    from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "config.model.compile is 'layer', and there is no C++ compiler here; install g++, name one in the environment as "
            "CXX, or leave compile out"
        ) from error
    torch._dynamo.config.recompile_limit = _MAX_KINDS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    plain: Callable[[Any], Any] = torch.compiler.disable
    for inner in part.modules():
        if isinstance(inner, Moe):
            inner.forward = plain(inner.forward)  # type: ignore[method-assign]
        elif isinstance(inner, Attention) and not on_gpu:
            inner.attend = plain(inner.attend)  # type: ignore[method-assign]
    part.forward = torch.compile(part.forward, dynamic=False, options={"fallback_random": True})

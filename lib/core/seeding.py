"""Seeds derived by name, so that no two uses share a random stream and none depends on call order."""

import hashlib
import random

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and their order, equal in every process."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permutation(num_items: int, *parts: int | str) -> np.ndarray:
    """[num_items] int64 random permutation, a function of the parts alone."""
    return np.random.Generator(np.random.PCG64(derive_seed("permutation", *parts))).permutation(num_items)


def seed_process(*parts: int | str) -> None:
    """Seed Python's and NumPy's global generators (torch is seeded where torch is used)."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)

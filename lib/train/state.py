"""Everything of a run that changes while it runs, in one registry: what isn't in it isn't saved.

Each rank keeps its state as named tensors and JSON values. A tensor says which box of the whole it is, so that another
number of ranks can cut the whole anew.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lib.core.manifest import Json
from lib.train.boxes import Box


@dataclass(frozen=True)
class Piece:
    """This rank's part of a tensor."""

    local: torch.Tensor
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Where `local` begins in the whole."""

    @property
    def box(self) -> Box:
        return Box(self.offset, tuple(self.local.shape))


Fetch = Callable[[str, tuple[int, ...], tuple[int, ...]], torch.Tensor]
"""(name, offset, shape of the box) -> that box of the saved whole."""


class Stateful(Protocol):
    """Something whose state is saved. `pieces` refer to live memory; the caller copies."""

    def pieces(self) -> dict[str, Piece]: ...

    def values(self) -> Json: ...

    def merge(self, values_of_ranks: list[Json]) -> Json:
        """This rank's values from those of all ranks of a group of another size or layout."""
        ...

    def load(self, fetch: Fetch, values: Json) -> None: ...


@dataclass
class TrainState:
    """The registry: name -> what has state. Names prefix the tensors' names."""

    parts: dict[str, Stateful] = field(default_factory=dict)

    def register(self, name: str, part: Stateful) -> None:
        if name in self.parts or "/" in name:
            raise ValueError(f"state {name!r} is registered already, or holds a '/'")
        self.parts[name] = part

    def pieces(self) -> dict[str, Piece]:
        return {f"{name}/{key}": piece for name, part in self.parts.items() for key, piece in part.pieces().items()}

    def values(self) -> Json:
        return {name: part.values() for name, part in self.parts.items()}

    def load(self, fetch: Fetch, values_of_ranks: list[dict[str, Json]], *, rank: int | None) -> None:
        """Take over what `len(values_of_ranks)` ranks saved, as one of as many ranks in the same layout, or as any of others.

        Args:
            rank: whose values become this rank's; None: those of all are merged.
                Raises:
            ValueError: the saved names are not the registered ones.
        """
        saved_names = values_of_ranks[0].keys()
        if saved_names != self.parts.keys():
            raise ValueError(f"the checkpoint holds {sorted(saved_names)}, the run needs {sorted(self.parts)}")
        for name, part in self.parts.items():
            each = [values[name] for values in values_of_ranks]
            part.load(_prefixed(fetch, name), part.merge(each) if rank is None else each[rank])

    def census(self) -> list[str]:
        """Name of every tensor and every value that is saved, sorted."""
        values = [f"{name}/{key}" for name, values in self.values().items() for key in values]
        return sorted([*self.pieces(), *values])


def _prefixed(fetch: Fetch, prefix: str) -> Fetch:
    return lambda name, offset, shape: fetch(f"{prefix}/{name}", offset, shape)


def piece_of(tensor: torch.Tensor) -> Piece:
    """The local part of a (distributed) tensor."""
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local()
        assert tuple(local.shape) == tuple(shape), f"local shape {local.shape}, expected {shape}"
        return Piece(local.detach(), tuple(tensor.shape), tuple(offset))
    return Piece(tensor.detach(), tuple(tensor.shape), (0,) * tensor.ndim)


def _fill(tensor: torch.Tensor, name: str, fetch: Fetch) -> None:
    piece = piece_of(tensor)
    piece.local.copy_(fetch(name, piece.offset, tuple(piece.local.shape)))


class ModelAndOptimizer:
    """Master weights that are trained, and AdamW's two moments and step count of each; and all buffers.

    Frozen weights are not state: they are those of the model that the run began with.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def pieces(self) -> dict[str, Piece]:
        found: dict[str, Piece] = {}
        for name, parameter in self._parameters().items():
            found[f"weight/{name}"] = piece_of(parameter)
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{key}/{name}"] = piece_of(value)
        for name, buffer in self.module.named_buffers():
            found[f"buffer/{name}"] = piece_of(buffer)
        return found

    def values(self) -> Json:
        return {"moments": sorted({key for state in self.optimizer.state.values() for key in state})}

    def merge(self, values_of_ranks: list[Json]) -> Json:
        return values_of_ranks[0]

    @torch.no_grad()
    def load(self, fetch: Fetch, values: Json) -> None:
        for name, parameter in self._parameters().items():
            _fill(parameter, f"weight/{name}", fetch)
            state: dict[str, torch.Tensor] = {}
            for key in values["moments"]:
                # AdamW counts steps in a plain scalar for each parameter, the rest is laid out as the parameter is.
                scalar = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state[key] = scalar if key == "step" else torch.zeros_like(parameter.data)
                _fill(state[key], f"{key}/{name}", fetch)
            if state:
                self.optimizer.state[parameter] = state
        for name, buffer in self.module.named_buffers():
            _fill(buffer, f"buffer/{name}", fetch)


class RandomGenerators:
    """The process-wide generators of Python, NumPy and torch. Each rank has its own."""

    def pieces(self) -> dict[str, Piece]:
        return {}

    def values(self) -> Json:
        numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
        version, internal, gauss = random.getstate()
        return {
            "python": {"version": version, "internal": list(internal), "gauss": gauss},
            "numpy": {
                "key": numpy_state["state"]["key"].tolist(),
                "pos": int(numpy_state["state"]["pos"]),
                "has_gauss": int(numpy_state["has_gauss"]),
                "gauss": float(numpy_state["gauss"]),
            },
            "torch": bytes(torch.get_rng_state().tolist()).hex(),
            "cuda": bytes(torch.cuda.get_rng_state().tolist()).hex() if torch.cuda.is_available() else None,
        }

    def merge(self, values_of_ranks: list[Json]) -> Json:
        """No saved state fits another number or layout of ranks: the generators stay as they were seeded."""
        return {}

    def load(self, fetch: Fetch, values: Json) -> None:
        if not values:
            return
        python, numpy_state = values["python"], values["numpy"]
        random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
        np.random.set_state(
            {
                "bit_generator": "MT19937",
                "state": {"key": np.array(numpy_state["key"], dtype=np.uint32), "pos": numpy_state["pos"]},
                "has_gauss": numpy_state["has_gauss"],
                "gauss": numpy_state["gauss"],
            }
        )
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(values["torch"])), dtype=torch.uint8))
        if values["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(values["cuda"])), dtype=torch.uint8))


class Values:
    """State that is plain JSON behind two functions: a data position, counters."""

    def __init__(
        self, read: Callable[[], Json], write: Callable[[Json], None], merge: Callable[[list[Json]], Json] | None = None
    ) -> None:
        """merge: values of all ranks -> values for a rank of a group of another size or layout; by default rank 0's."""
        self._read, self._write, self._merge = read, write, merge

    def pieces(self) -> dict[str, Piece]:
        return {}

    def values(self) -> Json:
        return self._read()

    def merge(self, values_of_ranks: list[Json]) -> Json:
        return self._merge(values_of_ranks) if self._merge else values_of_ranks[0]

    def load(self, fetch: Fetch, values: Json) -> None:
        self._write(values)

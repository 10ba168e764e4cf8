"""Nothing that has state is left out of the registry: what a worker holds while it trains is walked, object by object."""

import inspect
import random
from collections.abc import Iterator
from types import FrameType, FunctionType, MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lib.train import loop
from lib.train.state import TrainState
from tests.lib.recipes.conftest import Inputs, job, train

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
PROTOCOLS = ("load_state", "load_state_dict", "set_state")
DATA = {"data/fingerprint", "data/next_row", "data/streams", "data/version"}
RANDOM = {"random/python", "random/numpy", "random/torch", "random/cuda"}


def has_state(item: object) -> bool:
    return isinstance(item, GENERATORS) or any(callable(getattr(type(item), name, None)) for name in PROTOCOLS)


def inside(item: object) -> Iterator[object]:
    """What an object holds: items, attributes, variables that a function took along, the object of a method."""
    if isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, (list, tuple, set, frozenset)):
        yield from item
    elif isinstance(item, MethodType):
        yield item.__self__
    elif isinstance(item, FunctionType):
        yield from (cell.cell_contents for cell in item.__closure__ or ())
    elif isinstance(item, (nn.Module, torch.optim.Optimizer)):
        yield from (value for value in vars(item).values() if isinstance(value, GENERATORS))
    elif type(item).__module__.startswith(("lib.", "tests.")):
        slots = [getattr(item, name) for name in getattr(type(item), "__slots__", ()) if hasattr(item, name)]
        yield from [*getattr(item, "__dict__", {}).values(), *slots]


def stateful(roots: list[object]) -> dict[int, object]:
    """By identity, all with state that is reached from the roots; a module's own modules count as the module."""
    seen: dict[int, object] = {}
    waiting = list(roots)
    while waiting:
        item = waiting.pop()
        if id(item) not in seen:
            seen[id(item)] = item
            waiting += inside(item)
    return {number: item for number, item in seen.items() if has_state(item)}


def unregistered(state: TrainState, roots: list[object]) -> list[object]:
    """With state, reached from the roots and not from what is registered."""
    known = stateful([state.parts])
    return [item for number, item in stateful(roots).items() if number not in known]


@pytest.fixture(scope="module")
def at_work(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, dict[str, Any], list[str]]:
    """The registry of a tiny run, all that its functions hold when it saves for the first time, and the census of then."""
    found: list[tuple[TrainState, dict[str, Any], list[str]]] = []
    is_saved = loop.is_saved

    def look(step: int, **when: int) -> bool:
        frame: FrameType | None = inspect.currentframe()
        assert frame is not None and frame.f_back is not None and frame.f_back.f_back is not None
        steps, recipe = frame.f_back, frame.f_back.f_back
        if not found:
            held = {**recipe.f_locals, **steps.f_locals}
            found.append((held["state"], held, held["state"].census()))
        return is_saved(step, **when)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "is_saved", look)
        train(inputs, job(steps=3), tmp_path_factory.mktemp("census"))
    return found[0]


def test_all_that_has_state_is_registered(at_work: tuple[TrainState, dict[str, Any], list[str]]) -> None:
    """[F5] Model, optimizer, the feed with its position; and nothing else that a worker holds has any."""
    state, held, _ = at_work
    assert {"module", "training", "feed", "chats", "store", "journal"} <= held.keys()  # the frames are the right ones
    assert unregistered(state, list(held.values())) == []
    names = {type(item).__name__ for item in stateful(list(held.values())).values()}
    assert {"AdamW", "Prefetcher"} <= names and any("LossModule" in name for name in names)


def test_what_is_not_registered_is_found(at_work: tuple[TrainState, dict[str, Any], list[str]]) -> None:
    """Each part left out in turn, a generator that a dataclass hides, and an average of the weights."""
    state, held, _ = at_work
    for name in ("model", "data"):
        without = TrainState({other: part for other, part in state.parts.items() if other != name})
        assert unregistered(without, list(held.values()))
    for extra in (torch.Generator(), random.Random(0), torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1))):
        assert unregistered(state, [{"new": [extra]}]) == [extra]


def test_the_census_of_a_run_is_this(at_work: tuple[TrainState, dict[str, Any], list[str]]) -> None:
    """[F5] Each parameter's weight, two moments and step count; the data position; four kinds of random generators."""
    state, held, census = at_work
    names = [name for name, _ in held["module"].named_parameters()]
    model = {f"model/{kind}/{name}" for kind in ("weight", "exp_avg", "exp_avg_sq", "step") for name in names}
    assert set(census) == model | DATA | RANDOM | {"model/moments"}
    assert list(state.parts) == ["model", "random", "data"] and len(names) > 10

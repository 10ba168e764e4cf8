"""Which source a stream's next row comes from: weighted, by counter, so that a resume and any number of ranks agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lib.config.data import DataConfig, MixtureSource
from lib.core.errors import ConfigError, DataError
from lib.core.seeding import derive_seed
from lib.data.shuffle import ExampleSource, ShuffledRows, SourceOrder, read_again

OWN_DATA = "data"
"""Name of the only source where there is no mixture."""
_DRAWS_AT_ONCE = 256


@dataclass(frozen=True)
class Mixture:
    """The sources of a run and how they are mixed; shared by all its streams."""

    orders: tuple[SourceOrder, ...]
    settings: tuple[MixtureSource, ...]
    config: DataConfig

    @staticmethod
    def of(sources: Mapping[str, ExampleSource], config: DataConfig) -> "Mixture":
        """Args: sources by the names of `config.mixture`, or the only one, as OWN_DATA, where that is empty.

        Raises:
            ConfigError: the names don't agree.
            DataError: a source has no rows.
        """
        settings = config.mixture or (MixtureSource(name=OWN_DATA),)
        names = [setting.name for setting in settings]
        if sorted(names) != sorted(sources):
            raise ConfigError(f"data.mixture names the sources {names}, given are {sorted(sources)}")
        orders = (SourceOrder(sources[name], name, seed=config.seed, num_streams=config.num_streams) for name in names)
        return Mixture(tuple(orders), settings, config)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(setting.name for setting in self.settings)

    @property
    def digests(self) -> dict[str, str]:
        return {order.name: order.source.digest for order in self.orders}

    @property
    def is_scheduled(self) -> bool:
        return any(setting.schedule for setting in self.settings)

    def weights(self, step: int) -> tuple[float, ...]:
        """Each source's share of the rows at an optimizer step; their sum is 1."""
        raw = [setting.weight_at(step) ** (1.0 / self.config.temperature) for setting in self.settings]
        return tuple(weight / sum(raw) for weight in raw)


class Mixer:
    """One stream's rows of all sources."""

    def __init__(self, mixture: Mixture, stream: int) -> None:
        self._mixture, self._stream = mixture, stream
        config = mixture.config
        self._cursors = [ShuffledRows(order, stream, config.shuffle_rows) for order in mixture.orders]
        self._limits = [_share(setting.max_rows, stream, config.num_streams) for setting in mixture.settings]
        self._num_draws = 0
        self.num_rows = [0] * len(self._cursors)
        """Rows taken of each source."""
        self.num_passed_on = [0] * len(self._cursors)
        """Rows that were a source's turn when its cap was reached, and that another gave."""
        self._weights = lru_cache(maxsize=2)(mixture.weights)
        self._draws = lru_cache(maxsize=2)(self._drawn)

    def take(self, num_rows: int, step: int) -> list[tuple[int, int, int, Any]]:
        """(source, split, row, example) of the next `num_rows` rows.

        Args:
            step: the optimizer step that they are read for.
        Raises:
            DataError: a row can't be used, a source is empty, or no source with a weight is left.
        """
        rows: list[tuple[int, int, int, Any]] = []
        while len(rows) < num_rows:
            if len(self._cursors) == 1:
                rows += self._take(0, num_rows - len(rows))
            else:
                rows += self._take(self._choose(step), 1)
        return rows

    def read_again(self, places: Sequence[tuple[int, int, int]]) -> list[Any]:
        """The examples at (source, split, row) places, in their order."""
        found = {
            number: read_again(order, [place[1:] for place in places if place[0] == number])
            for number, order in enumerate(self._mixture.orders)
        }
        return [found[number][split, row] for number, split, row in places]

    @property
    def min_epoch(self) -> int:
        """Epochs that all sources that are left have completed."""
        live = [number for number in range(len(self._cursors)) if not self._is_exhausted(number)]
        return min((self._cursors[number].epoch for number in live), default=0)

    @property
    def epochs(self) -> list[int]:
        return [cursor.epoch for cursor in self._cursors]

    def state(self) -> dict[str, Any]:
        """Positions in the sources, and what was taken, as JSON values."""
        cursors = [cursor.state() for cursor in self._cursors]
        counts = {"num_rows": list(self.num_rows), "num_passed_on": list(self.num_passed_on)}
        return {"cursors": cursors, "num_draws": self._num_draws, **counts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken."""
        for cursor, values in zip(self._cursors, state["cursors"], strict=True):
            cursor.load_state(values)
        self._num_draws = state["num_draws"]
        self.num_rows, self.num_passed_on = list(state["num_rows"]), list(state["num_passed_on"])

    def _take(self, number: int, num_rows: int) -> list[tuple[int, int, int, Any]]:
        taken = self._cursors[number].take(num_rows)
        self.num_rows[number] += len(taken)
        return [(number, split, row, example) for split, row, example in taken]

    def _choose(self, step: int) -> int:
        """The source of the next draw; a source that is exhausted passes its turn on to the others by their weights."""
        index = self._num_draws
        first, second = self._draws(index // _DRAWS_AT_ONCE)[index % _DRAWS_AT_ONCE]
        self._num_draws += 1
        weights = self._weights(step)
        number = _pick(weights, first)
        if not self._is_exhausted(number):
            return number
        self.num_passed_on[number] += 1
        left = [0.0 if self._is_exhausted(other) else weight for other, weight in enumerate(weights)]
        if not sum(left):
            raise DataError(
                f"at step {step} every source of data.mixture that has a weight has reached its cap; "
                "raise a cap or give another source a weight there"
            )
        return _pick([weight / sum(left) for weight in left], second)

    def _is_exhausted(self, number: int) -> bool:
        setting, limit = self._mixture.settings[number], self._limits[number]
        if setting.max_epochs is not None and self._cursors[number].epoch >= setting.max_epochs:
            return True
        return limit is not None and self.num_rows[number] >= limit

    def _drawn(self, part: int) -> list[list[float]]:
        seed = derive_seed("mix", self._mixture.config.seed, self._stream, part)
        draws: list[list[float]] = np.random.Generator(np.random.PCG64(seed)).random((_DRAWS_AT_ONCE, 2)).tolist()
        return draws


def _share(max_rows: int | None, stream: int, num_streams: int) -> int | None:
    """A stream's part of a cap on all streams' rows; the parts add up to it."""
    return None if max_rows is None else (max_rows - stream + num_streams - 1) // num_streams


def _pick(weights: Sequence[float], draw: float) -> int:
    """The source whose part of [0, 1) holds `draw`; never one without a weight."""
    total = 0.0
    for number, weight in enumerate(weights):
        total += weight
        if draw < total:
            return number
    return max(number for number, weight in enumerate(weights) if weight)

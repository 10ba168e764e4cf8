"""The order of samples of a whole run: packed rows for every step and rank, exact across restarts and rank counts.

The rows of an epoch are shuffled and dealt out to `num_streams` virtual streams. Packed row g of the run (0, 1, 2, ...)
comes from stream g % num_streams, step s takes rows s * R to (s + 1) * R - 1, and a rank those whose g % num_ranks is its
own. So the samples of step s are a function of data, seed and number of streams, and a rank owns whole streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from lib.config.data import DataConfig
from lib.core.errors import ConfigError, DataError
from lib.core.seeding import permutation
from lib.data.batch import PackedRow
from lib.data.rows import ConversationTable
from lib.data.virtual_stream import VirtualStream
from lib.tokens.chat import ChatEncoder

_STATE_VERSION = 1
_EPOCHS_KEPT = 4
"""Shuffled orders in memory; streams differ by an epoch or two at most unless there are few rows, when an order is cheap."""


@dataclass(frozen=True)
class StepRows:
    """A rank's packed rows of one optimizer step."""

    rows: list[PackedRow]
    """[rows_per_step / num_ranks] in order of the global row number."""


class PackedStream:
    """Endless packed rows of one rank.

    Args of the constructor beside the plain ones:
        rows_per_step: packed rows of the global batch, over all ranks.
    Raises:
        ConfigError: ranks don't divide the streams or the rows of a step.
        DataError: fewer rows than streams.
    """

    def __init__(
        self,
        table: ConversationTable,
        encoder: ChatEncoder,
        config: DataConfig,
        *,
        sequence_length: int,
        rows_per_step: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        for name, value in (("data.num_streams", config.num_streams), ("train.rows_per_step", rows_per_step)):
            if value % num_ranks:
                raise ConfigError(f"{name} ({value}) is not a multiple of the {num_ranks} ranks")
        if len(table) < config.num_streams:
            raise DataError(
                f"the data set has {len(table)} rows for {config.num_streams} streams, so some would be empty; "
                f"lower data.num_streams to {len(table)} or less"
            )
        if encoder.train_on != config.train_on:
            raise ConfigError(f"the encoder trains on {encoder.train_on!r} but data.train_on is {config.train_on!r}")
        self._rows_per_step, self._rank, self._num_ranks = rows_per_step, rank, num_ranks
        self._num_streams = config.num_streams
        self._next_row = 0
        self._fingerprint = {
            "dataset": table.digest,
            "tokenizer": encoder.tokenizer.digest,
            "sequence_length": sequence_length,
            **config.model_dump(include={"seed", "num_streams", "open_packs", "long_rows", "train_on"}),
        }
        order = _shuffled_order(len(table), config.seed, config.num_streams)
        self._streams = {
            number: VirtualStream(table, encoder, config, sequence_length, partial(order, number))
            for number in range(rank, config.num_streams, num_ranks)
        }
        self._snapshots = {str(number): stream.state() for number, stream in self._streams.items()}

    def next_step(self) -> StepRows:
        """This rank's rows of the next step.

        Raises:
            DataError: see VirtualStream.next_row. The stream must not be used afterwards.
        """
        rows = []
        for row in range(self._next_row, self._next_row + self._rows_per_step):
            if row % self._num_ranks == self._rank:
                number = row % self._num_streams
                rows.append(self._streams[number].next_row())
                # Only the streams that gave a row have changed, so a snapshot after each step stays cheap.
                self._snapshots[str(number)] = self._streams[number].state()
        self._next_row += self._rows_per_step
        return StepRows(rows)

    def state(self) -> dict[str, Any]:
        """Where this rank's streams are after the last `next_step`, as JSON values; not changed by later steps."""
        return {
            "version": _STATE_VERSION,
            "fingerprint": dict(self._fingerprint),
            "next_row": self._next_row,
            "streams": dict(self._snapshots),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: one rank's state, or on any number of ranks the merged state of all.

        Raises:
            ConfigError: the state is of other data or settings, or lacks streams of this rank.
        """
        theirs = {"version": state["version"], **state["fingerprint"]}
        ours: dict[str, Any] = {"version": _STATE_VERSION, **self._fingerprint}
        changed = [
            f"{name} was {theirs.get(name)!r}, is {value!r}" for name, value in ours.items() if theirs.get(name) != value
        ]
        if changed:
            raise ConfigError(f"the saved data position is of another run ({'; '.join(changed)}); start a new run")
        missing = sorted(self._snapshots.keys() - state["streams"].keys(), key=int)
        if missing:
            raise ConfigError(f"the saved data position lacks streams {', '.join(missing[:8])}; merge the states of all ranks")
        self._next_row = state["next_row"]
        for number, stream in self._streams.items():
            stream.load_state(state["streams"][str(number)])
            self._snapshots[str(number)] = stream.state()


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of a whole run from those of its ranks, all taken after the same step.

    Raises:
        ConfigError: the states are not of one run and step.
    """
    first = states[0]
    if any((state["fingerprint"], state["next_row"]) != (first["fingerprint"], first["next_row"]) for state in states):
        raise ConfigError("data positions of different runs or steps can't be merged")
    merged = {number: stream for state in states for number, stream in state["streams"].items()}
    return {**first, "streams": dict(sorted(merged.items(), key=lambda entry: int(entry[0])))}


def _shuffled_order(num_rows: int, seed: int, num_streams: int) -> Any:
    """(stream, epoch) -> rows of that stream in that epoch: every row is in exactly one stream of every epoch."""

    @lru_cache(maxsize=_EPOCHS_KEPT)
    def whole(epoch: int) -> np.ndarray:
        return permutation(num_rows, seed, epoch).astype(np.int32 if num_rows < 2**31 else np.int64)

    def order(number: int, epoch: int) -> np.ndarray:
        return whole(epoch)[number::num_streams]

    return order

"""The order of samples of a whole run: packed rows for every step and rank, exact across restarts and rank counts.

The rows of an epoch are shuffled and dealt out to `num_streams` virtual streams (see lib/data/shuffle.py). Packed row g of
the run (0, 1, 2, ...) comes from stream g % num_streams, step s takes rows s * R to (s + 1) * R - 1, and a rank those whose
g % num_ranks is its own. So the samples of step s are a function of data, seed and number of streams, a rank owns whole
streams, and every rank has the same number of rows of the same shape in every step, however unlike their data are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lib.config.data import DataConfig
from lib.core.errors import ConfigError
from lib.data.document import Document, PackedRow
from lib.data.mixture import Mixture
from lib.data.shuffle import ExampleSource
from lib.data.virtual_stream import Encode, Position, VirtualStream

if TYPE_CHECKING:  # so that a data process of other examples needs no tokenizer library
    from lib.tokens.chat import ChatEncoder

STATE_VERSION = 2
_NOT_DECISIVE = {"workers", "worker_kind", "prefetch_batches", "tokenize_first"}
"""Settings that change no batch."""


@dataclass(frozen=True)
class Encoding:
    """How examples become documents."""

    encode: Encode
    decided_by: Mapping[str, str]
    """Name -> value of whatever else decides the tokens and masks; part of a saved position."""

    @staticmethod
    def of_chat(encoder: "ChatEncoder") -> "Encoding":
        """Of conversations; their labels go with them."""

        def encode(examples: Sequence[Any]) -> list[Document]:
            found = zip(encoder.encode(examples), examples, strict=True)
            return [Document.of(encoded, example.labels) for encoded, example in found]

        return Encoding(encode, {"tokenizer": encoder.tokenizer.digest})


@dataclass(frozen=True)
class Share:
    """Whose rows a stream gives out: a rank's, or those of one of its background workers."""

    rank: int = 0
    num_ranks: int = 1
    worker: int = 0
    num_workers: int = 1

    @property
    def first(self) -> int:
        return self.rank + self.num_ranks * self.worker

    @property
    def step(self) -> int:
        return self.num_ranks * self.num_workers


@dataclass(frozen=True)
class StepRows:
    """The packed rows of one optimizer step that fall to a share."""

    rows: list[PackedRow]
    numbers: list[int]
    """Of the rows, within the run; they rise. A rank has rows_per_step / num_ranks of them."""


@dataclass(frozen=True)
class StreamPosition:
    """Where the streams of a share are; not changed by later steps."""

    fingerprint: dict[str, Any]
    next_row: int
    streams: dict[str, Position | dict[str, Any]]
    """Number -> position, as such or as JSON values."""

    def to_json(self) -> dict[str, Any]:
        streams = {number: at if isinstance(at, dict) else at.to_json() for number, at in self.streams.items()}
        return {"version": STATE_VERSION, "fingerprint": self.fingerprint, "next_row": self.next_row, "streams": streams}


class PackedStream:
    """Endless packed rows of one share.

    Args of the constructor beside the plain ones:
        sources: by the names of `config.mixture`; a single one is called OWN_DATA where that is empty.
        rows_per_step: packed rows of the global batch, over all ranks.
    Raises:
        ConfigError: ranks and workers don't divide the streams, ranks not the rows of a step, or a source isn't given.
        DataError: a source has no rows.
    """

    def __init__(
        self,
        sources: Mapping[str, ExampleSource],
        encoding: Encoding,
        config: DataConfig,
        *,
        sequence_length: int,
        rows_per_step: int,
        share: Share = Share(),
    ) -> None:
        if config.num_streams % share.step:
            workers = f" x {share.num_workers} workers" if share.num_workers > 1 else ""
            raise ConfigError(
                f"data.num_streams ({config.num_streams}) is not a multiple of the {share.num_ranks} ranks{workers}"
            )
        if rows_per_step % share.num_ranks:
            raise ConfigError(f"train.rows_per_step ({rows_per_step}) is not a multiple of the {share.num_ranks} ranks")
        mixture = Mixture.of(sources, config)
        self._rows_per_step, self._share, self._num_streams = rows_per_step, share, config.num_streams
        self._next_row = 0
        self._fingerprint: dict[str, Any] = {
            "sources": mixture.digests,
            "sequence_length": sequence_length,
            **encoding.decided_by,
            **_decisive(config),
            **({"rows_per_step": rows_per_step} if mixture.is_scheduled else {}),
        }
        self._streams = {
            number: VirtualStream(mixture, encoding.encode, config, sequence_length, number)
            for number in range(share.first, config.num_streams, share.step)
        }
        self._positions: dict[str, Position | dict[str, Any]] = {
            str(number): stream.position() for number, stream in self._streams.items()
        }

    def next_step(self) -> StepRows:
        """This share's rows of the next step.

        Raises:
            DataError: see VirtualStream.next_row. The stream must not be used afterwards.
        """
        rows, numbers = [], []
        start, stop, step = self._next_row, self._next_row + self._rows_per_step, self._share.step
        for row in range(start + (self._share.first - start) % step, stop, step):
            number = row % self._num_streams
            rows.append(self._streams[number].next_row(row // self._rows_per_step))
            numbers.append(row)
        # Only the streams that gave a row have changed, so a position after each step stays cheap.
        self._positions |= {str(row % self._num_streams): self._streams[row % self._num_streams].position() for row in numbers}
        self._next_row = stop
        return StepRows(rows, numbers)

    def position(self) -> StreamPosition:
        """Where this share's streams are after the last `next_step`."""
        return StreamPosition(self._fingerprint, self._next_row, dict(self._positions))

    def state(self) -> dict[str, Any]:
        """The position as JSON values."""
        return self.position().to_json()

    def start(self) -> None:
        """Nothing to do: rows are read when they are asked for."""

    def stop(self) -> None:
        """Nothing to do: a stream waits for nobody but its sources, and they have deadlines of their own."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: one share's state, or on any number of ranks and workers the merged state of all.

        Raises:
            ConfigError: the state is of other data or settings, or lacks streams of this share.
        """
        theirs = {"version": state["version"], **state["fingerprint"]}
        ours: dict[str, Any] = {"version": STATE_VERSION, **self._fingerprint}
        changed = [
            f"{name} was {theirs.get(name)!r}, is {ours.get(name)!r}"
            for name in {**ours, **theirs}
            if theirs.get(name) != ours.get(name)
        ]
        if changed:
            raise ConfigError(f"the saved data position is of another run ({'; '.join(changed)}); start a new run")
        missing = sorted(self._positions.keys() - state["streams"].keys(), key=int)
        if missing:
            raise ConfigError(f"the saved data position lacks streams {', '.join(missing[:8])}; merge the states of all ranks")
        self._next_row = state["next_row"]
        for number, stream in self._streams.items():
            stream.load_state(state["streams"][str(number)])
            self._positions[str(number)] = stream.position()


def _decisive(config: DataConfig) -> dict[str, Any]:
    """The settings that decide the batches. Where a source lies is none: what it holds is named by its digest."""
    values = config.model_dump(mode="json", exclude=_NOT_DECISIVE)
    for source in values["mixture"]:
        del source["location"]
    return values


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

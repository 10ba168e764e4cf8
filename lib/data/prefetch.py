"""Batches prepared while the device computes: in no, one or several background workers, with the same batches from all."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from lib.core.errors import InfraError
from lib.data.stream import StepRows, StreamPosition

Prepared = TypeVar("Prepared")
Made = TypeVar("Made")

_POLL_SECONDS = 0.2
_DEADLINE_SECONDS = 600.0


class RowProducer(Protocol):
    """The rows of a share, step after step: a PackedStream, or a process that runs one."""

    def start(self) -> None:
        """Begin with what can go on in the background; the other calls do so else."""
        ...

    def next_step(self) -> StepRows: ...

    def position(self) -> StreamPosition:
        """After the last `next_step`."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where a position was taken, given as JSON values."""
        ...

    def stop(self) -> None:
        """Have a `next_step` that another thread is in end soon, if it would wait."""
        ...


class Prefetcher(Generic[Prepared]):
    """Gives out what `prepare` makes of each step's rows, in order, at most `depth` steps ahead; rows are read as far ahead
    of that again.

    `position()` belongs to the step last given out, however far the workers have run ahead. An exception of a producer or of
    `prepare` is raised by the `next_step` that would have given out its step. The workers start with the `with` block or
    the first step; after that close it, or leave the block.
    """

    def __init__(
        self,
        producers: Sequence[RowProducer],
        prepare: Callable[[StepRows], Prepared],
        depth: int,
        *,
        deadline_seconds: float = _DEADLINE_SECONDS,
    ) -> None:
        """Args:
        producers: those of the workers that share a rank's rows, each run in a thread of its own.
        depth: 0 prepares each step when it is asked for, in the caller's thread.
        """
        self.stall_seconds = 0.0
        """Time that `next_step` has waited so far."""
        self._producers, self._prepare = producers, prepare
        self._depth, self._deadline_seconds = depth, deadline_seconds
        self._position: StreamPosition | None = None
        self._parts: list[_Background[tuple[StepRows, StreamPosition]]] = []
        self._whole: _Background[tuple[Prepared, StreamPosition]] | None = None
        self._next: Callable[[], tuple[Prepared, StreamPosition]] | None = None
        self._is_closed = False

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where a position was taken, given as JSON values; before the first step."""
        assert self._next is None, "the workers are running"
        for producer in self._producers:
            producer.load_state(state)

    def next_step(self) -> Prepared:
        """What was prepared for the next step.

        Raises:
            InfraError: nothing came within the deadline.
        """
        if self._is_closed:
            raise RuntimeError("the prefetcher is closed")
        start = time.perf_counter()
        try:
            prepared, self._position = self._started()()
        except BaseException:
            self.close()
            raise
        self.stall_seconds += time.perf_counter() - start
        return prepared

    def position(self) -> StreamPosition:
        """Where the streams are after the step last given out."""
        if self._position is None:
            for producer in self._producers:  # so that processes come up side by side
                producer.start()
            self._position = _merged([producer.position() for producer in self._producers])
        return self._position

    def close(self) -> None:
        """Stop the workers and wait for them."""
        self._is_closed = True
        workers: list[_Background[Any]] = [*self._parts]
        if self._whole:
            workers.append(self._whole)
        for worker in workers:
            worker.stop()
        for producer in self._producers:
            producer.stop()
        for worker in workers:
            worker.join()

    def __enter__(self) -> Self:
        self._started()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _started(self) -> Callable[[], tuple[Prepared, StreamPosition]]:
        if self._next is not None:
            return self._next
        self.position()
        takers = [_taker(producer) for producer in self._producers]
        if self._depth:
            # Each worker is the only one to touch its producer; another thread puts their rows together and prepares them,
            # while the workers go on.
            self._parts = [_Background(take, self._depth, self._deadline_seconds) for take in takers]
            takers = [part.next for part in self._parts]

        def make() -> tuple[Prepared, StreamPosition]:
            rows, positions = zip(*(take() for take in takers))
            return self._prepare(_in_order(rows)), _merged(positions)

        self._next = make
        if self._depth:
            self._whole = _Background(make, self._depth, self._deadline_seconds)
            self._next = self._whole.next
        return self._next


def _taker(producer: RowProducer) -> Callable[[], tuple[StepRows, StreamPosition]]:
    return lambda: (producer.next_step(), producer.position())


def _in_order(parts: Sequence[StepRows]) -> StepRows:
    """The rows of all workers by their number in the run."""
    pairs = sorted((number, row) for part in parts for number, row in zip(part.numbers, part.rows))
    return StepRows([row for _, row in pairs], [number for number, _ in pairs])


def _merged(positions: Sequence[StreamPosition]) -> StreamPosition:
    first = positions[0]
    assert all(position.next_row == first.next_row for position in positions), "workers of one rank are at different steps"
    streams = {number: at for position in positions for number, at in position.streams.items()}
    return StreamPosition(first.fingerprint, first.next_row, streams)


class _Background(Generic[Made]):
    """A thread that calls `make` again and again, and a bounded queue of what came out."""

    def __init__(self, make: Callable[[], Made], depth: int, deadline_seconds: float) -> None:
        self._make, self._deadline_seconds = make, deadline_seconds
        self._ready: queue.Queue[tuple[Made] | BaseException] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def next(self) -> Made:
        """The next result; what `make` raised is raised here."""
        found = self._wait()
        if isinstance(found, BaseException):
            raise found
        return found[0]

    def stop(self) -> None:
        self._stop.set()

    def join(self) -> None:
        """Raises InfraError when the thread doesn't end within the deadline."""
        self._thread.join(timeout=self._deadline_seconds)
        if self._thread.is_alive():
            raise InfraError(f"the data thread did not end within {self._deadline_seconds:.0f} s")

    def _wait(self) -> tuple[Made] | BaseException:
        deadline = time.monotonic() + self._deadline_seconds
        while not self._stop.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                raise InfraError(f"no batch was prepared within {self._deadline_seconds:.0f} s; the data thread hangs")
            try:
                return self._ready.get(timeout=min(left, _POLL_SECONDS))
            except queue.Empty:
                continue
        raise RuntimeError("the prefetcher is closed")

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                found: tuple[Made] | BaseException = (self._make(),)
            except BaseException as error:  # noqa: BLE001 - whatever it is, the consumer's thread must see it
                found = error
            self._hand_over(found)
            if isinstance(found, BaseException):
                return

    def _hand_over(self, found: tuple[Made] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(found, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return

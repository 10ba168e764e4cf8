"""A background thread that prepares batches while the device computes."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from lib.core.errors import InfraError
from lib.data.stream import PackedStream, StepRows

Prepared = TypeVar("Prepared")

_POLL_SECONDS = 0.2


class Prefetcher(Generic[Prepared]):
    """Gives out what `prepare` makes of each step's rows, in order, at most `depth` steps ahead.

    `state()` belongs to the step last given out, however far the thread has run ahead. An exception of the stream or of
    `prepare` is raised by the `next_step` that would have given out its step. Close it, or use it in a `with` block.
    """

    def __init__(
        self,
        stream: PackedStream,
        prepare: Callable[[StepRows], Prepared],
        depth: int,
        *,
        deadline_seconds: float = 600.0,
    ) -> None:
        self._stream, self._prepare, self._deadline_seconds = stream, prepare, deadline_seconds
        self._state = stream.state()
        self._ready: queue.Queue[tuple[Prepared, dict[str, Any]] | BaseException] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def next_step(self) -> Prepared:
        """What was prepared for the next step.

        Raises:
            InfraError: nothing came within the deadline.
        """
        if self._stop.is_set():
            raise RuntimeError("the prefetcher is closed")
        try:
            found = self._ready.get(timeout=self._deadline_seconds)
        except queue.Empty as error:
            raise InfraError(f"no batch was prepared within {self._deadline_seconds:.0f} s; the data thread hangs") from error
        if isinstance(found, BaseException):
            self.close()
            raise found
        prepared, self._state = found
        return prepared

    def state(self) -> dict[str, Any]:
        """The stream's state after the step last given out."""
        return self._state

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        self._thread.join(timeout=self._deadline_seconds)
        if self._thread.is_alive():
            raise InfraError(f"the data thread did not end within {self._deadline_seconds:.0f} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                found: tuple[Prepared, dict[str, Any]] | BaseException = (
                    self._prepare(self._stream.next_step()),
                    self._stream.state(),
                )
            except BaseException as error:  # noqa: BLE001 - whatever it is, the consumer's thread must see it
                found = error
            self._hand_over(found)
            if isinstance(found, BaseException):
                return

    def _hand_over(self, found: tuple[Prepared, dict[str, Any]] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(found, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return

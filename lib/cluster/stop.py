"""The wish to stop soon, which spot machines and clusters express by SIGTERM some time before they take a process away."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether a process has been asked to stop. A signal handler does no more than to note it."""

    def __init__(self, grace_seconds: float = float("inf")) -> None:
        """grace_seconds: time that is left from the request on."""
        self._grace_seconds = grace_seconds
        self._requested_at: float | None = None
        self._heeded = False

    @property
    def requested(self) -> bool:
        return self._requested_at is not None

    @property
    def overdue(self) -> bool:
        """The time that was left is over."""
        return self._requested_at is not None and time.monotonic() > self._requested_at + self._grace_seconds

    def request(self) -> None:
        if self._requested_at is None:
            self._requested_at = time.monotonic()

    def listen(self) -> None:
        """From now on SIGTERM is a request, while somebody heeds it; else it does what it did before.

        Python lets only the main thread handle signals: elsewhere nothing changes.
        """
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

            def handle(number: int, frame: FrameType | None) -> None:
                if self._heeded:
                    self.request()
                else:
                    signal.signal(number, before)
                    os.kill(os.getpid(), number)

            signal.signal(signal.SIGTERM, handle)

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """For work that looks at `requested` often and then ends by itself."""
        self._heeded = True
        try:
            yield
        finally:
            self._heeded = False

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Listen and heed in a block, and leave the handler that was there."""
        before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
        self.listen()
        try:
            with self.heeded():
                yield
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)

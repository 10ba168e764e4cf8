"""An iterator that a background thread keeps a few items ahead of."""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")

_POLL_SECONDS = 0.1


class _End:
    """Put after the last item, with what ended the iterator if it was an error."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class ReadAhead(Generic[Item]):
    """Runs `items` in a thread, at most `depth` items ahead; its exception is raised where its item would have come.

    The thread ends when the items do, on `close`, or when this object is no longer referred to.
    """

    def __init__(self, items: Iterator[Item], depth: int = 2) -> None:
        self._ready: queue.Queue[Item | _End] = queue.Queue(maxsize=depth)
        stop = threading.Event()
        # The thread must not hold `self`: an iterator that is dropped half-way would never be collected.
        threading.Thread(target=_fill, args=(items, self._ready, stop), name="read-ahead", daemon=True).start()
        self.close = weakref.finalize(self, stop.set)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        if not self.close.alive:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, _End):
            self.close()
            if item.error is not None:
                raise item.error
            raise StopIteration
        return item


def _fill(items: Iterator[Item], ready: "queue.Queue[Item | _End]", stop: threading.Event) -> None:
    error = None
    try:
        for item in items:
            if not _put(item, ready, stop):
                return
    except BaseException as raised:  # noqa: BLE001 - whatever it is, the reader's thread must see it
        error = raised
    _put(_End(error), ready, stop)


def _put(item: Item | _End, ready: "queue.Queue[Item | _End]", stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=_POLL_SECONDS)
        except queue.Full:
            continue
        return True
    return False

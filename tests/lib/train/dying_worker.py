"""A worker that dies by SIGKILL until it has been started often enough."""

import os
import signal
from typing import Any

from lib.cluster.group import Worker, dispatch


class DyingWorker(Worker):
    """Counts its starts in a file."""

    @dispatch()
    def train(self, counter: str, deaths: int, step: int) -> dict[str, Any]:
        with open(counter, "a", encoding="utf-8") as stream:
            stream.write(f"{step}\n")
        with open(counter, encoding="utf-8") as stream:
            starts = len(stream.readlines())
        if starts <= deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"starts": starts}

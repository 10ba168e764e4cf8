"""A packed stream in a process of its own, for data whose decoding would keep the rank's interpreter from its device.

`python -m lib.data.produce IN OUT` is that process: it reads one JSON request from the pipe IN and writes frames to OUT.
A frame is a JSON header, and after those of a step the tokens, masks and weights of its documents as plain arrays.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from lib.core import errors
from lib.core.errors import InfraError, PostflyteError
from lib.core.manifest import Json
from lib.core.transient import class_elsewhere
from lib.data.document import Document, PackedRow
from lib.data.stream import PackedStream, Share, StepRows, StreamPosition

_ARRAYS = (("token_ids", np.int32), ("loss_mask", np.uint8), ("weights", np.float32))
Opener = Callable[[Json, Share], PackedStream]
"""(arguments, share) -> a fresh stream; a function of a module, so that another process finds it by name."""


class ProcessProducer:
    """Runs a stream in another process; it stays a step and what fits into a pipe ahead."""

    def __init__(self, opener: Opener, arguments: Json, share: Share, *, deadline_seconds: float = 600.0) -> None:
        """The process starts with the first call of `position` or `next_step`."""
        self._request = {"opener": f"{opener.__module__}:{opener.__qualname__}", "arguments": arguments, "share": vars(share)}
        self._deadline_seconds = deadline_seconds
        self._state: dict[str, Any] | None = None
        self._position: StreamPosition | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._frames: Connection | None = None

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where a position was taken, given as JSON values; before the first step."""
        assert self._process is None, "the process is running"
        self._state = state

    def start(self) -> None:
        """Have the process come up; what it says is waited for later."""
        self._started()

    def position(self) -> StreamPosition:
        """After the last `next_step`."""
        if self._position is None:
            header = self._header()
            self._position = StreamPosition(header["fingerprint"], header["next_row"], header["streams"])
        return self._position

    def next_step(self) -> StepRows:
        """The rows of the next step.

        Raises:
            PostflyteError: what the stream raised in its process.
            InfraError: the process died, or nothing came within the deadline; or a disk or a network failed it.
            RuntimeError: any other exception of the stream, with its traceback.
        """
        before = self.position()
        header = self._header()
        arrays = [np.frombuffer(self._frame(), kind) if size else None for (_, kind), size in zip(_ARRAYS, header["sizes"])]
        self._position = StreamPosition(before.fingerprint, header["next_row"], {**before.streams, **header["streams"]})
        return StepRows(_rows(header["rows"], arrays), header["numbers"])

    def stop(self) -> None:
        """End the process, also while another thread waits for it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _started(self) -> Connection:
        if self._frames is None:
            (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
            command = [sys.executable, "-m", "lib.data.produce", str(their_in), str(their_out)]
            path = os.pathsep.join(entry for entry in sys.path if entry)
            self._process = subprocess.Popen(command, pass_fds=(their_in, their_out), env={**os.environ, "PYTHONPATH": path})
            os.close(their_in)
            os.close(their_out)
            with Connection(our_out, readable=False) as request:
                request.send_bytes(json.dumps({**self._request, "state": self._state}).encode())
            self._frames = Connection(our_in, writable=False)
        return self._frames

    def _header(self) -> dict[str, Any]:
        header: dict[str, Any] = json.loads(self._frame())
        if "error" in header:
            raise getattr(errors, header["error"] or "", RuntimeError)(header["message"])
        return header

    def _frame(self) -> bytes:
        frames = self._started()
        try:
            if not frames.poll(self._deadline_seconds):
                raise InfraError(f"no batch was prepared within {self._deadline_seconds:.0f} s; the data process hangs")
            return frames.recv_bytes()
        except (EOFError, OSError) as error:
            code = self._process.wait() if self._process else None
            raise InfraError(f"the data process died (exit code {code}); see its messages above") from error


def _rows(rows: Sequence[Sequence[Sequence[Any]]], arrays: Sequence[np.ndarray | None]) -> list[PackedRow]:
    token_ids, loss_mask, weights = arrays
    assert token_ids is not None and loss_mask is not None
    start, packed = 0, []
    for row in rows:
        documents = []
        for sample_id, length, is_weighted, labels in row:
            stop = start + length
            factors = weights[start:stop] if is_weighted and weights is not None else None
            mask = loss_mask[start:stop].view(np.bool_)
            documents.append(Document(sample_id, token_ids[start:stop], mask, factors, labels=labels))
            start = stop
        packed.append(PackedRow(tuple(documents)))
    return packed


def _step_frames(step: StepRows, position: StreamPosition, changed: Mapping[str, Any]) -> list[bytes]:
    documents = [document for row in step.rows for document in row.documents]
    ones = any(document.weights is not None for document in documents)
    arrays = [
        np.concatenate([np.zeros(0, np.int32), *(document.token_ids for document in documents)]).astype(np.int32),
        np.concatenate([np.zeros(0, np.bool_), *(document.loss_mask for document in documents)]).view(np.uint8),
        np.concatenate([_weights(document) for document in documents]) if ones else np.zeros(0, np.float32),
    ]
    header = {
        "rows": [
            [[d.sample_id, len(d.token_ids), d.weights is not None, d.labels] for d in row.documents] for row in step.rows
        ],
        "numbers": step.numbers,
        "next_row": position.next_row,
        "streams": changed,
        "sizes": [array.nbytes for array in arrays],
    }
    return [json.dumps(header).encode(), *(array.tobytes() for array in arrays if array.nbytes)]


def _weights(document: Document) -> np.ndarray:
    return np.zeros(len(document.token_ids), np.float32) if document.weights is None else document.weights


def _serve(requests: Connection, frames: Connection) -> None:
    request = json.loads(requests.recv_bytes())
    requests.close()
    try:
        module, name = request["opener"].split(":")
        opener: Opener = getattr(importlib.import_module(module), name)
        stream = opener(request["arguments"], Share(**request["share"]))
        if request["state"] is not None:
            stream.load_state(request["state"])
        before = stream.position()
        start = before.to_json()
        frames.send_bytes(json.dumps({key: start[key] for key in ("fingerprint", "next_row", "streams")}).encode())
        while True:
            step, position = stream.next_step(), stream.position()
            moved = {number: at for number, at in position.streams.items() if at is not before.streams[number]}
            changed = {number: at if isinstance(at, dict) else at.to_json() for number, at in moved.items()}
            for part in _step_frames(step, position, changed):
                frames.send_bytes(part)
            before = position
    except Exception as error:  # noqa: BLE001 - it goes on as a message and is raised by the rank
        message = str(error) if isinstance(error, PostflyteError) else f"the data process failed:\n{traceback.format_exc()}"
        frames.send_bytes(json.dumps({"error": class_elsewhere(error), "message": message}).encode())


def main() -> None:
    """Serve until the other side is gone."""
    try:
        _serve(Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False))
    except (BrokenPipeError, EOFError):
        return


if __name__ == "__main__":
    main()

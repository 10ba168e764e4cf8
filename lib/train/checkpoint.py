"""Checkpoints of a run: each rank writes its part in the background, rank 0 publishes when all parts are there.

    step-00000050/    a folder of kind "train_state" on the run's shelf
        state-00000-of-00002.safetensors   a rank's tensors; the header tells which box of the whole each one is
        values-00000-of-00002.json         a rank's plain values: data position, random generators, counters
        train_state.json                   step, number of ranks, identity of the run
        metrics.jsonl, timings.jsonl       the run's record up to that step

A checkpoint is there whole or not at all, and an older one goes only after a newer one is there. Parts go through the shelf
(lib/train/shelf.py), so all ranks must reach it.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lib.core.artifact import mapped
from lib.core.errors import ArtifactCorruptError, InfraError, ModelError
from lib.core.manifest import Json, canonical_json
from lib.train.boxes import Replicas
from lib.train.parts import PartsReader, read_record, tensors_name, values_name, write_part
from lib.train.reread import failed_to_read, verify_patiently
from lib.train.retention import Retention
from lib.train.shelf import Draft, Shelf, Stored
from lib.train.snapshot import Snapshot
from lib.train.state import TrainState

KIND = "train_state"
FACTS_NAME = "train_state.json"
_PREFIX = "step-"
_LOGGER = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """Of a checkpoint's folder on the shelf."""
    return f"{_PREFIX}{step:08d}"


def published_steps(shelf: Shelf) -> list[int]:
    """Steps that have a published checkpoint, the newest first (see `latest_valid` for whether it can be believed)."""
    return sorted((int(name.removeprefix(_PREFIX)) for name in shelf.names() if name.startswith(_PREFIX)), reverse=True)


def latest_valid(shelf: Shelf) -> int | None:
    """Step of the newest checkpoint whose every byte is as it was written; None if there is none.

    A damaged one is reported in the log and set aside, out of the way of the run that writes it again. So is one that the disk
    can't read, however often it is tried, but not before an older one was read: then it isn't all of the disk that fails. Call
    only while holding the run folder's lock.

    Raises:
        InfraError: one can't be read now, which doesn't mean that it is damaged, and there is no older one.
    """
    unread: dict[int, OSError] = {}
    for step in published_steps(shelf):
        try:
            verify_patiently(shelf, step_name(step), KIND)
        except ArtifactCorruptError as error:
            _give_up(shelf, step, error)
        except OSError as error:
            if not failed_to_read(error):
                raise
            unread[step] = error
        else:
            for newer, failure in unread.items():
                _give_up(shelf, newer, failure)
            return step
    if unread:
        names = ", ".join(map(step_name, unread))
        raise InfraError(
            f"{shelf}: the disk can't read {names} ({next(iter(unread.values()))}), and no older checkpoint is whole. Nothing "
            "of it was given up. Look after the disk and run again; to do without it, move it away"
        )
    return None


def _give_up(shelf: Shelf, step: int, error: Exception) -> None:
    _LOGGER.warning("checkpoint of step %d can't be used, going back to the one before: %s", step, error)
    shelf.set_aside(step_name(step))


def read_facts(stored: Stored) -> Json:
    """Contents of train_state.json: step, num_ranks, and what the run stored beside them."""
    facts: Json = json.loads(stored.read_bytes(FACTS_NAME))
    return facts


def read_values(stored: Stored) -> list[Json]:
    """[num_ranks] the plain values that each rank saved, by the name of the part of the state that they belong to."""
    num_ranks = read_facts(stored)["num_ranks"]
    return [read_record(stored, rank, num_ranks)["values"] for rank in range(num_ranks)]


class CheckpointStore:
    """One rank's view of a run's checkpoints.

    A save takes three moves, so that the step waits for none of them: `save_async` copies the state and begins to write;
    `part_written` turns true; once it is true on every rank (which the ranks tell each other in a collective that they
    make anyway), all call `all_parts_written`, and rank 0 publishes, again in the background.
    """

    def __init__(self, shelf: Shelf, *, keep: Retention, rank: int, num_ranks: int, start: str = "0") -> None:
        """start: names this start of the run, the same on all ranks: keeps what they write apart from that of another one."""
        self._shelf, self._keep, self._rank, self._num_ranks, self._start = shelf, keep, rank, num_ranks, start
        self._replicas, self._snapshot = Replicas(), Snapshot()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[dict[str, str]] | None = None
        self._publishing: Future[None] | None = None
        self._step = 0
        if rank == 0:
            self._prune()  # what a start before had no more time to

    @property
    def pending(self) -> bool:
        """A save has begun and `all_parts_written` hasn't been called for it."""
        return self._writing is not None

    def save_async(self, step: int, state: TrainState, facts: Json, logs: Mapping[str, Path] | None = None) -> None:
        """Copy the state and write this rank's part in the background; the save before must have been finished.

        All ranks must call it. What several of them hold, the lowest writes.

        Args:
            facts: what train_state.json says beside step and number of ranks: "loss" of the step, by which the best are kept;
                "layout", any value that differs where ranks hold other pieces; what the run wants to know of it.
            logs: of rank 0: name -> a file that only grows; as it is now, it is part of the checkpoint.
        """
        assert self._writing is None, "the checkpoint before is not finished"
        pieces = state.pieces()
        mine = self._replicas.to_write({name: piece.box for name, piece in pieces.items()})
        self._snapshot.lay_out({name: piece for name, piece in pieces.items() if name in mine})
        values = state.values()
        self._step = step
        facts = {**facts, "step": step, "num_ranks": self._num_ranks}
        cuts = {name: (path, path.stat().st_size) for name, path in (logs or {}).items()}
        self._writing = self._writer.submit(self._write_part, self._draft(step), values, facts, cuts)
        self._snapshot.copy()

    def part_written(self) -> bool:
        """This rank's part of the pending save is on the shelf.

        Raises:
            InfraError: writing it, or publishing an earlier one, failed; names the path and the remedy.
        """
        self._raise_failure_of_publishing(wait=False)
        if self._writing is None or not self._writing.done():
            return False
        self._writing.result()
        return True

    def wait_for_part(self) -> None:
        """Wait until `part_written`. Raises as it does."""
        if self._writing is not None:
            self._writing.result()

    def all_parts_written(self) -> None:
        """Every rank's part is on the shelf: rank 0 publishes the checkpoint in the background."""
        assert self._writing is not None and self._writing.done()
        written, self._writing = self._writing.result(), None
        if self._rank == 0:
            self._raise_failure_of_publishing(wait=True)
            self._publishing = self._writer.submit(self._publish, self._step, written)

    def wait_until_published(self) -> None:
        """On rank 0: wait for the publishing under way. Raises InfraError when it failed."""
        self._raise_failure_of_publishing(wait=True)

    def close(self) -> None:
        self._writer.shutdown(wait=True, cancel_futures=True)

    def _draft(self, step: int) -> Draft:
        return self._shelf.draft(step_name(step), self._start)

    def _raise_failure_of_publishing(self, *, wait: bool) -> None:
        if self._publishing is not None and (wait or self._publishing.done()):
            self._publishing.result()
            self._publishing = None

    def _write_part(self, draft: Draft, values: Json, facts: Json, cuts: Mapping[str, tuple[Path, int]]) -> dict[str, str]:
        """Returns the sha256 of files that rank 0 alone writes."""
        try:
            write_part(draft, self._snapshot, values, rank=self._rank, num_ranks=self._num_ranks)
            if self._rank:
                return {}
            written = {FACTS_NAME: draft.write(FACTS_NAME, [memoryview(canonical_json(facts).encode())])}
            return written | {name: _write_beginning(draft, name, path, size) for name, (path, size) in cuts.items()}
        except OSError as error:
            draft.discard()
            raise self._failure(draft, error) from error

    def _publish(self, step: int, written: Mapping[str, str]) -> None:
        draft = self._draft(step)
        try:
            draft.publish(KIND, {**written, **self._parts(draft)}, meta={"step": step, "num_ranks": self._num_ranks})
        except OSError as error:
            draft.discard()
            raise self._failure(draft, error) from error
        try:
            self._prune()
        except OSError as error:
            raise self._failure(self._shelf, error) from error

    def _parts(self, draft: Draft) -> dict[str, str]:
        """Name -> sha256 of what all ranks have written: of tensors as their writers say, who have hashed them already."""
        found: dict[str, str] = {}
        for rank in range(self._num_ranks):
            record = draft.read_bytes(name := values_name(rank, self._num_ranks))
            found[name] = hashlib.sha256(record).hexdigest()
            found[tensors_name(rank, self._num_ranks)] = json.loads(record)["sha256"]
        return found

    def _prune(self) -> None:
        losses = {step: self._loss_of(step) for step in published_steps(self._shelf)}
        for old in losses.keys() - self._keep.kept(losses):
            self._shelf.remove(step_name(old))

    def _loss_of(self, step: int) -> float:
        """Of a checkpoint's step, where anybody asks. One that can't be read is damaged: it is never among the best."""
        if not self._keep.best:
            return math.inf
        try:
            return float(read_facts(self._shelf.open(step_name(step)))["loss"])
        except (ArtifactCorruptError, OSError, ValueError, KeyError):
            return math.inf

    def _failure(self, where: object, error: Exception) -> InfraError:
        return InfraError(
            f"{where}: can't write the checkpoint of step {self._step}: {error}. {self._shelf.remedy} and run again: it goes "
            "on from the last published checkpoint, which is untouched"
        )


def _write_beginning(draft: Draft, name: str, path: Path, size_bytes: int) -> str:
    """The first bytes of a file that may grow meanwhile; their sha256."""
    with mapped(path, size_bytes) as content:
        return draft.write(name, [content])


def load_state(stored: Stored, state: TrainState, *, rank: int, num_ranks: int, layout: Json) -> Json:
    """Take over a checkpoint's state as rank `rank` of `num_ranks`, which may differ from the number that saved it.

    What a rank has for itself (its random generators) is taken over only where number and layout of the ranks are the same.

    `stored` must have been verified. Each rank reads only what its pieces cover. Returns train_state.json.

    Raises:
        ArtifactCorruptError: the parts of a tensor leave a hole.
        ModelError: it is of other tensors than the run has, or of other shapes.
    """
    facts = read_facts(stored)
    num_saved = facts["num_ranks"]
    reader = PartsReader(stored, rank=rank * num_saved // num_ranks, num_ranks=num_saved)
    try:
        _check_shapes(stored, state, reader)
        alike = (num_saved, facts["layout"]) == (num_ranks, layout)
        state.load(reader.fetch, read_values(stored), rank=rank if alike else None)
    finally:
        reader.close()
    return facts


def _check_shapes(stored: Stored, state: TrainState, reader: PartsReader) -> None:
    """Raises ModelError. Moments, which a run has after its first step, are looked at when they are read."""
    for name, piece in state.pieces().items():
        saved = reader.whole_shape(name)
        if saved != tuple(piece.shape):
            found = "holds none" if saved is None else f"has {list(saved)}"
            raise ModelError(
                f"{stored}: the run needs {name} with shape {list(piece.shape)}, the checkpoint {found}; go on with the model "
                "and config.model that it was trained with"
            )
    weights = {name.rpartition("/")[0] + "/" for name in state.pieces()}
    more = sorted(name for name in reader.opened_names() if name.startswith(tuple(weights)) and name not in state.pieces())
    if more:
        raise ModelError(
            f"{stored}: trains {', '.join(more[:3])} and so on, which the run doesn't; go on with the config.model that it was "
            "trained with"
        )

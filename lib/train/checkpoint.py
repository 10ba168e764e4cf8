"""Checkpoints of a run: each rank writes its part in the background, rank 0 publishes when all parts are there.

    checkpoints/step-00000050/    an artifact of kind "train_state"
        state-00000-of-00002.safetensors   a rank's tensors; the header tells which box of the whole each one is
        values-00000-of-00002.json         a rank's plain values: data position, random generators, counters
        train_state.json                   step, number of ranks, identity of the run

A checkpoint is there whole or not at all, and an older one goes only after a newer one is there. Parts go through the
file system, so on several nodes the run folder must be a shared one.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lib.core.artifact import STAGING_PREFIX, Staged, publish, verify, write_durably
from lib.core.errors import ArtifactCorruptError, InfraError, ModelError
from lib.core.manifest import Json, canonical_json
from lib.train.boxes import Replicas
from lib.train.parts import PartsReader, read_record, tensors_name, write_part
from lib.train.retention import Retention
from lib.train.snapshot import Snapshot
from lib.train.state import TrainState

KIND = "train_state"
FACTS_NAME = "train_state.json"
_PREFIX = "step-"
_LOGGER = logging.getLogger(__name__)


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"{_PREFIX}{step:08d}"


def published_steps(root: Path) -> list[int]:
    """Steps that have a published checkpoint, the newest first (see `latest_valid` for whether it can be believed)."""
    return sorted((int(path.name.removeprefix(_PREFIX)) for path in root.glob(f"{_PREFIX}*") if path.is_dir()), reverse=True)


def latest_valid(root: Path) -> int | None:
    """Step of the newest checkpoint whose every byte is as it was written; None if there is none.

    A damaged one is reported in the log and renamed to `damaged-…`, out of the way of the run that writes it again. Call
    only while holding the run folder's lock.
    """
    for step in published_steps(root):
        folder = checkpoint_folder(root, step)
        try:
            verify(folder, KIND)
        except ArtifactCorruptError as error:
            _LOGGER.warning("checkpoint of step %d can't be used, going back to the one before: %s", step, error)
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
        else:
            return step
    return None


def read_facts(folder: Path) -> Json:
    """Contents of train_state.json: step, num_ranks, and what the run stored beside them."""
    facts: Json = json.loads((folder / FACTS_NAME).read_text(encoding="utf-8"))
    return facts


def read_values(folder: Path) -> list[Json]:
    """[num_ranks] the plain values that each rank saved, by the name of the part of the state that they belong to."""
    num_ranks = read_facts(folder)["num_ranks"]
    return [read_record(folder, rank, num_ranks)["values"] for rank in range(num_ranks)]


class CheckpointStore:
    """One rank's view of a run's checkpoints.

    A save takes three moves, so that the step waits for none of them: `save_async` copies the state and begins to write;
    `part_written` turns true; once it is true on every rank (which the ranks tell each other in a collective that they
    make anyway), all call `all_parts_written`, and rank 0 publishes, again in the background.
    """

    def __init__(self, root: Path, *, keep: Retention, rank: int, num_ranks: int, attempt: int = 0) -> None:
        """attempt: number of this start of the run; keeps its half-written files apart from those of a start before."""
        self.root, self._keep, self._rank, self._num_ranks, self._attempt = root, keep, rank, num_ranks, attempt
        self._replicas, self._snapshot = Replicas(), Snapshot()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._publishing: Future[None] | None = None
        self._step = 0
        root.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            self._prune()  # what a start before had no more time to

    @property
    def pending(self) -> bool:
        """A save has begun and `all_parts_written` hasn't been called for it."""
        return self._writing is not None

    def save_async(self, step: int, state: TrainState, facts: Json) -> None:
        """Copy the state and write this rank's part in the background; the save before must have been finished.

        All ranks must call it. What several of them hold, the lowest writes.

        Args:
            facts: what train_state.json says beside step and number of ranks: "loss" of the step, by which the best are kept;
                "layout", any value that differs where ranks hold other pieces; what the run wants to know of it.
        """
        assert self._writing is None, "the checkpoint before is not finished"
        pieces = state.pieces()
        mine = self._replicas.to_write({name: piece.box for name, piece in pieces.items()})
        self._snapshot.take({name: piece for name, piece in pieces.items() if name in mine})
        values = state.values()
        self._step = step
        facts = {**facts, "step": step, "num_ranks": self._num_ranks}
        self._writing = self._writer.submit(self._write_part, self._staging(step), values, facts)

    def part_written(self) -> bool:
        """This rank's part of the pending save is on the disk.

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

    def all_parts_written(self, *, before_publishing: Callable[[], None] | None = None) -> None:
        """Every rank's part is on the disk: rank 0 publishes the checkpoint in the background."""
        assert self._writing is not None and self._writing.done()
        self._writing = None
        if self._rank == 0:
            self._raise_failure_of_publishing(wait=True)
            self._publishing = self._writer.submit(self._publish, self._step, before_publishing)

    def wait_until_published(self) -> None:
        """On rank 0: wait for the publishing under way. Raises InfraError when it failed."""
        self._raise_failure_of_publishing(wait=True)

    def close(self) -> None:
        self._writer.shutdown(wait=True, cancel_futures=True)

    def _staging(self, step: int) -> Path:
        return self.root / f"{STAGING_PREFIX}{_PREFIX}{step:08d}-{self._attempt}"

    def _raise_failure_of_publishing(self, *, wait: bool) -> None:
        if self._publishing is not None and (wait or self._publishing.done()):
            self._publishing.result()
            self._publishing = None

    def _write_part(self, staging: Path, values: Json, facts: Json) -> None:
        try:
            write_part(staging, self._snapshot, values, rank=self._rank, num_ranks=self._num_ranks)
            if self._rank == 0:
                write_durably(staging / FACTS_NAME, canonical_json(facts))
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise self._failure(staging, error) from error

    def _publish(self, step: int, before_publishing: Callable[[], None] | None) -> None:
        staging, target = self._staging(step), checkpoint_folder(self.root, step)
        try:
            if before_publishing is not None:
                before_publishing()
            publish(_staged(staging, step, self._num_ranks), target, KIND)
            self._prune()
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise self._failure(target, error) from error

    def _prune(self) -> None:
        losses = {step: _loss_of(checkpoint_folder(self.root, step)) for step in published_steps(self.root)}
        for old in losses.keys() - self._keep.kept(losses):
            _remove(checkpoint_folder(self.root, old))

    def _failure(self, path: Path, error: Exception) -> InfraError:
        return InfraError(
            f"{path}: can't write the checkpoint of step {self._step}: {error}. Free disk space there (or choose another "
            "POSTFLYTE_HOME) and run again: it goes on from the last published checkpoint, which is untouched"
        )


def load_state(folder: Path, state: TrainState, *, rank: int, num_ranks: int, layout: Json) -> Json:
    """Take over a checkpoint's state as rank `rank` of `num_ranks`, which may differ from the number that saved it.

    What a rank has for itself (its random generators) is taken over only where number and layout of the ranks are the same.

    `folder` must have been verified. Each rank reads only what its pieces cover. Returns train_state.json.

    Raises:
        ArtifactCorruptError: the parts of a tensor leave a hole.
        ModelError: it is of other tensors than the run has, or of other shapes.
    """
    facts = read_facts(folder)
    num_saved = facts["num_ranks"]
    reader = PartsReader(folder, rank=rank * num_saved // num_ranks, num_ranks=num_saved)
    try:
        _check_shapes(folder, state, reader)
        alike = (num_saved, facts["layout"]) == (num_ranks, layout)
        state.load(reader.fetch, read_values(folder), rank=rank if alike else None)
    finally:
        reader.close()
    return facts


def _check_shapes(folder: Path, state: TrainState, reader: PartsReader) -> None:
    """Raises ModelError. Moments, which a run has after its first step, are looked at when they are read."""
    for name, piece in state.pieces().items():
        saved = reader.whole_shape(name)
        if saved != tuple(piece.shape):
            found = "holds none" if saved is None else f"has {list(saved)}"
            raise ModelError(
                f"{folder}: the run needs {name} with shape {list(piece.shape)}, the checkpoint {found}; go on with the model "
                "and config.model that it was trained with"
            )
    weights = {name.rpartition("/")[0] + "/" for name in state.pieces()}
    more = sorted(name for name in reader.opened_names() if name.startswith(tuple(weights)) and name not in state.pieces())
    if more:
        raise ModelError(
            f"{folder}: trains {', '.join(more[:3])} and so on, which the run doesn't; go on with the config.model that it was "
            "trained with"
        )


def _loss_of(folder: Path) -> float:
    """Of the checkpoint's step. One that can't be read is damaged: it is never among the best."""
    try:
        return float(read_facts(folder)["loss"])
    except (OSError, ValueError, KeyError):
        return math.inf


def _staged(staging: Path, step: int, num_ranks: int) -> Staged:
    staged = Staged(staging, meta={"step": step, "num_ranks": num_ranks})
    for rank in range(num_ranks):
        staged.known_sha256[tensors_name(rank, num_ranks)] = read_record(staging, rank, num_ranks)["sha256"]
    return staged


def _remove(folder: Path) -> None:
    """Out of sight in one move, then deleted: a kill in between leaves nothing that looks like a checkpoint."""
    doomed = folder.with_name(f"{STAGING_PREFIX}removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)

"""The loop of a training recipe, one rank's view: steps, checkpoints and records, the same whatever is minimised."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lib.cluster.group import Worker
from lib.config.recipes import TrainJob
from lib.core.errors import PreemptedError
from lib.core.manifest import Json
from lib.core.seeding import derive_seed, seed_process
from lib.core.store import bring
from lib.data.document import PackedRow
from lib.data.prefetch import Prefetcher, RowProducer
from lib.data.stream import StepRows, merge_states
from lib.parallel.clock import CLOCK
from lib.parallel.mesh import DataPlace
from lib.parallel.reduce import all_reduce_sum, barrier
from lib.train.checkpoint import CheckpointStore, load_state, step_name
from lib.train.journal import Journal
from lib.train.meters import LOG_NAMES, peak_flops
from lib.train.optim import learning_rate_at
from lib.train.profiling import StepProfiler
from lib.train.retention import Retention, is_saved
from lib.train.run_home import open_shelf
from lib.train.shelf import Stored
from lib.train.state import ModelAndOptimizer, RandomGenerators, TrainState, Values
from lib.train.step import MicroBatch, Training, count_step, train_step
from lib.train.times import StepTimes

Feed = Prefetcher[list[MicroBatch]]
"""The micro-batches of this rank, step by step."""


def data_place(worker: Worker, job: TrainJob) -> DataPlace:
    """Whose rows this rank trains on."""
    return DataPlace.of(worker.info.rank, worker.info.num_ranks, job.config.parallel)


def begin(worker: Worker, job: TrainJob, place: Json) -> None:
    """Seed this rank, fetch model and data where this machine doesn't have them, and say that it loads; before the model is
    made."""
    recipe, seed, rank = place["recipe"], job.config.train.seed, data_place(worker, job).rank
    seed_process(recipe, seed, rank)
    torch.manual_seed(derive_seed(recipe, seed, rank))
    for folder, origin in place["origins"].items():
        bring(Path(folder), origin)
    worker.emit({"kind": "phase", "phase": "load", "step": place["resume_step"]})


def open_feed(job: TrainJob, producers: Sequence[RowProducer], make: Callable[[Sequence[PackedRow]], MicroBatch]) -> Feed:
    """Micro-batches of `rows_per_micro_batch` packed rows each, made ahead where the data has workers."""
    size = job.config.train.rows_per_micro_batch

    def prepare(step_rows: StepRows) -> list[MicroBatch]:
        rows = step_rows.rows
        return [make(rows[start : start + size]) for start in range(0, len(rows), size)]

    return Prefetcher(producers, prepare, job.config.data.prefetch_batches if job.config.data.workers else 0)


def run_steps(worker: Worker, job: TrainJob, place: Json, training: Training, feed: Feed) -> None:
    """Train from the checkpoint of step place["resume_step"] (0: from the module as it is) to the end; all of it is on
    the run's shelf afterwards.

    Args:
        place: see `lib.train.run.run_training`.
    Raises:
        PreemptedError: on all ranks after the same step, when any of them was asked to stop; that step is saved.
    """
    config, info, device, run_dir = job.config, worker.info, torch.device(worker.info.device), Path(place["run_dir"])
    first_step, is_counted = place["resume_step"] + 1, data_place(worker, job).is_first
    state = registry(training, feed)
    shelf, layout = open_shelf(place["home"]), config.parallel.sizes(info.num_ranks)
    if first_step > 1:
        stored = shelf.open(step_name(place["resume_step"]))
        load_state(stored, state, rank=info.rank, num_ranks=info.num_ranks, layout=layout)
        if info.rank == 0:
            _restore_logs(stored, run_dir)
    keep = Retention(config.train.keep_checkpoints, config.train.keep_every, config.train.keep_best)
    store = CheckpointStore(shelf, keep=keep, rank=info.rank, num_ranks=info.num_ranks, start=place["start"])
    peak = all_reduce_sum({"flops": peak_flops(device, getattr(torch, config.model.compute_dtype))})["flops"]
    journal = None
    if info.rank == 0:
        journal = Journal(
            worker,
            run_dir,
            steps=job.steps,
            resume_step=place["resume_step"],
            steps_before=place["steps_before"],
            peak_flops=peak,
        )

    steps = StepProfiler(config.train.profile, run_dir, info.rank, device).watch(range(first_step, job.steps + 1))
    stops = False
    with feed, worker.stop.heeded():
        for step in steps:
            with CLOCK.part("data"):
                micro_batches = feed.next_step()
            counts = count_step(
                micro_batches,
                training.objective,
                training.flops,
                part_written=store.part_written(),
                stopping=worker.stop.requested,
                counted=is_counted,
            )
            if store.pending and counts.num_parts_written == info.num_ranks:
                store.all_parts_written()
            report = train_step(
                training,
                micro_batches,
                counts,
                step=step,
                learning_rate=learning_rate_at(step, steps=job.steps, peak=job.learning_rate, config=config.optim),
                max_grad_norm=config.optim.max_grad_norm,
                device=device,
            )
            times = StepTimes.over_ranks(device)
            if journal:
                journal.step_done(report, training.flops, counts, times)
            stops = counts.num_stopping > 0 and step < job.steps
            if stops or is_saved(step, steps=job.steps, every=config.train.checkpoint_every):
                with CLOCK.part("save"):
                    _finish_save(store, config.train.step_deadline_seconds)
                    facts = {"identity": place["identity"], "model": place["model"], "layout": layout, "loss": report.loss}
                    store.save_async(step, state, facts, journal.logs if journal else None)
            if stops:
                break
        _finish_save(store, config.train.step_deadline_seconds)
        store.wait_until_published()
        store.close()
        barrier(config.train.step_deadline_seconds)
    if stops:
        raise PreemptedError(f"SIGTERM ended the run after step {step} of {job.steps}, which is saved; run again to go on")
    worker.emit({"kind": "phase", "phase": "export", "step": job.steps})


def registry(training: Training, feed: Feed) -> TrainState:
    """All that changes while a rank trains."""
    state = TrainState()
    state.register("model", ModelAndOptimizer(training.module, training.optimizer))
    state.register("random", RandomGenerators())
    state.register("data", Values(lambda: feed.position().to_json(), feed.load_state, merge_states))
    return state


def _finish_save(store: CheckpointStore, deadline_seconds: float) -> None:
    """Wait until the save under way has all its parts, and have it published."""
    if store.pending:
        store.wait_for_part()
        barrier(deadline_seconds)
        store.all_parts_written()


def _restore_logs(stored: Stored, run_dir: Path) -> None:
    """The record of the steps up to a checkpoint, in place of what this machine may have of the run."""
    for name in LOG_NAMES:
        (run_dir / name).write_bytes(stored.read_bytes(name))

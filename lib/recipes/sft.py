"""Supervised fine-tuning: next-token cross-entropy on the assistant's tokens of packed conversations.

`SftWorker.train` is the algorithm, one rank's view, read top to bottom; `run_sft` is the driver around it.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from lib.cluster.group import Event, GroupFactory, Worker, dispatch
from lib.config.recipes import SftJob
from lib.core.artifact import Staged, link_or_copy, read_manifest, verify
from lib.core.errors import ModelError
from lib.core.examples import Conversation
from lib.core.manifest import Json, canonical_json, digest_of, file_sha256
from lib.core.seeding import derive_seed, seed_process
from lib.data.batch import collate
from lib.data.examples import mixture_digest, open_mixture
from lib.data.feed import ChatFeed
from lib.data.prefetch import Prefetcher
from lib.data.stats import PackingReport, packing_report
from lib.data.stream import StepRows, merge_states
from lib.models.flops import FlopCounter
from lib.models.hf_fallback import is_fallback
from lib.models.hf_io import read_spec
from lib.models.logit_report import LogitReport
from lib.models.lora import num_trained
from lib.models.peft_export import why_not_peft
from lib.parallel.mesh import DataPlace, build_mesh
from lib.parallel.plan import check_plan
from lib.parallel.reduce import all_reduce_sum, barrier
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from lib.train.checkpoint import CheckpointStore, checkpoint_folder, load_state, read_values
from lib.train.fallback import num_fallback_parameters
from lib.train.journal import Journal
from lib.train.lock import run_lock, worker_lock
from lib.train.meters import METRICS_NAME, TIMINGS_NAME, StepWaits, peak_flops, read_rows, speed_summary
from lib.train.model_folder import WEIGHTS, load_module, write_module
from lib.train.optim import build_optimizer, learning_rate_at
from lib.train.state import ModelAndOptimizer, RandomGenerators, TrainState, Values
from lib.train.step import MicroBatch, count_step, train_step
from lib.train.supervise import CHECKPOINTS, Progress, resume_step, tell, train_with_restarts
from lib.train.tracker import track

EXPORT = "export"
NUM_PREVIEWS = 3


class SftWorker(Worker):
    """One rank."""

    @dispatch()
    def train(self, job_values: Json, place: Json) -> Json:
        """Train from the checkpoint of step place["resume_step"] (0: from the model) to the end, then export the weights.

        Args:
            job_values: an SftJob as plain values.
            place: "model_dir", "data_dir", "run_dir", "identity", "resume_step"; "model", the digest of the model.
        """
        job = SftJob.parse(job_values, where="job")
        with worker_lock(Path(place["run_dir"])):
            return self._train(job, place)

    def _train(self, job: SftJob, place: Json) -> Json:
        config, info, device = job.config, self.info, torch.device(self.info.device)
        run_dir, model_dir = Path(place["run_dir"]), Path(place["model_dir"])
        first_step = place["resume_step"] + 1
        rows = DataPlace.of(info.rank, info.num_ranks, config.parallel)
        seed_process("sft", config.train.seed, rows.rank)
        torch.manual_seed(derive_seed("sft", config.train.seed, rows.rank))
        self.emit({"kind": "phase", "phase": "load", "step": place["resume_step"]})

        module = load_module(
            config.model,
            build_mesh(job.shape, config.parallel),
            model_dir,
            device,
            seed=config.train.seed,
            fresh=first_step == 1,
        )
        optimizer, flops = build_optimizer(module, config.optim), FlopCounter(module.decoder.spec, config.model.lora)
        encoder = ChatEncoder.of(Tokenizer.load(model_dir), config.data)
        chats = ChatFeed(config.data, place["data_dir"], str(model_dir), job.sequence_length, config.train.rows_per_step)
        feed = Prefetcher(
            chats.producers(encoder, rank=rows.rank, num_ranks=rows.num_ranks),
            _to_micro_batches(job, encoder.tokenizer.pad_id),
            config.data.prefetch_batches if config.data.workers else 0,
        )
        state = TrainState()
        state.register("model", ModelAndOptimizer(module, optimizer))
        state.register("random", RandomGenerators())
        state.register("data", Values(lambda: feed.position().to_json(), feed.load_state, merge_states))
        checkpoints = run_dir / CHECKPOINTS
        if first_step > 1:
            folder = checkpoint_folder(checkpoints, place["resume_step"])
            load_state(folder, state, rank=info.rank, num_ranks=info.num_ranks)
        store = CheckpointStore(checkpoints, keep=config.train.keep_checkpoints, rank=info.rank, num_ranks=info.num_ranks)
        peak = all_reduce_sum({"flops": peak_flops(device, getattr(torch, config.model.compute_dtype))})["flops"]
        journal = None
        if info.rank == 0:
            journal = Journal(self, run_dir, steps=job.steps, resume_step=place["resume_step"], peak_flops=peak)

        with feed:
            for step in range(first_step, job.steps + 1):
                began = time.perf_counter()
                micro_batches = feed.next_step()
                ready = time.perf_counter()
                counts = count_step(micro_batches, flops, part_written=store.part_written(), counted=rows.is_first)
                waits = StepWaits.over_ranks(
                    stall_seconds=ready - began, straggler_seconds=time.perf_counter() - ready, num_ranks=info.num_ranks
                )
                if store.pending and counts.num_parts_written == info.num_ranks:
                    store.all_parts_written(before_publishing=journal.sync if journal else None)
                report = train_step(
                    module,
                    optimizer,
                    micro_batches,
                    counts,
                    step=step,
                    learning_rate=learning_rate_at(step, steps=job.steps, peak=job.learning_rate, config=config.optim),
                    max_grad_norm=config.optim.max_grad_norm,
                    device=device,
                )
                if journal:
                    journal.step_done(report, flops, counts.num_attention_products, waits)
                if step % config.train.checkpoint_every == 0 or step == job.steps:
                    _finish_save(store, config.train.step_deadline_seconds, journal)
                    store.save_async(step, state, {"identity": place["identity"], "model": place["model"]})
        _finish_save(store, config.train.step_deadline_seconds, journal)
        store.wait_until_published()
        store.close()
        self.emit({"kind": "phase", "phase": "export", "step": job.steps})
        write_module(module, config.model.lora, encoder, run_dir / EXPORT, rank=info.rank)
        previews = chats.first_documents(encoder, NUM_PREVIEWS)
        return {"mask_preview_html": [encoder.preview_html(document.encoded()) for document in previews]}


def run_sft(
    job: SftJob,
    model_dir: Path,
    data_dir: Path,
    report: LogitReport,
    out: Staged,
    *,
    run_dir: Path,
    group_factory: GroupFactory,
    progress: Progress,
) -> None:
    """Train and fill `out`, an artifact of kind "checkpoint": hf/, state/, metrics.jsonl, train_report.json; and adapter/ under
    LoRA, where PEFT can hold it (meta "adapter" says so, or why not).

    A run that was killed, driver and all, goes on from its last checkpoint when it is called again with the same job and
    run folder, and ends in the same bits.

    Args:
        model_dir, data_dir: artifacts, a Hugging Face model and a data set of conversations, tokenised or not.
        report: the model's logit report.
        out: its lineage, with what the caller has put there, becomes tags of the tracked run.
        run_dir: the run's own folder; on several nodes, on a file system that all of them share.
        progress: called with the number of steps done and figures to show beside it (see lib/train/supervise.py `tell`).
    Raises:
        ModelError: the logit report is of another model, was not passed, or doesn't prove the packing that is asked for.
        ConfigError: the model doesn't have what LoRA shall adapt, or can't be cut as config.parallel says.
        RunInUseError: another live process trains in run_dir.
        NonFiniteLossError: names the step and its samples; earlier checkpoints are untouched.
        InfraError: the workers died too often, or a checkpoint couldn't be written.
    """
    check_plan(job.config.parallel)
    model, data = verify(model_dir), read_manifest(data_dir)
    _check_admitted(report, model.digest, packing=job.config.data.packing)
    num_trained, why_no_adapter = _trained(job, model_dir)
    data_digest = _data_digest(job, data_dir, data.digest)
    identity = run_identity(job, model_digest=model.digest, data_digest=data_digest)
    out.lineage.update(model=model.digest, data=data_digest, job=digest_of(job.model_dump(mode="json")))
    place = {"model_dir": str(model_dir), "data_dir": str(data_dir), "run_dir": str(run_dir)}
    place |= {"identity": identity, "model": model.digest}
    with run_lock(run_dir), track(job.config.tracking, identity, job.model_dump(mode="json"), out.lineage) as tracked:

        def on_event(event: Event) -> None:
            tracked.log(event)
            tell(progress, event)

        result = train_with_restarts(
            SftWorker,
            lambda step: [job.model_dump(mode="json"), {**place, "resume_step": step}],
            shape=job.shape,
            cluster=job.config.cluster,
            train=job.config.train,
            start_at=lambda: resume_step(run_dir, identity),
            group_factory=group_factory,
            on_event=on_event,
        )
        packing = _fill(out, job, run_dir, result)
    out.counts.update(trained_parameters=num_trained)
    out.meta.update(adapter=why_no_adapter or "peft" if job.config.model.lora else "none")
    speed = speed_summary(read_rows(run_dir / TIMINGS_NAME))
    out.info.update(
        speed,
        waste=asdict(packing.waste(**{name: speed[name] for name in ("train_seconds", "stall_seconds", "straggler_seconds")})),
        restarts=result["restarts"],
        num_ranks=job.shape.num_ranks,
        mlflow_run_id=tracked.run_id,
        run_identity=identity,
    )


def run_identity(job: SftJob, *, model_digest: str, data_digest: str) -> str:
    """Names a run by what decides its numbers: not by the cluster, deadlines or tracking, which may change on a restart."""
    values = job.model_dump(
        mode="json",
        exclude={
            "nodes": True,
            "gpus_per_node": True,
            "config": {
                "cluster": True,
                "parallel": True,
                "tracking": True,
                "data": {"prefetch_batches", "workers", "worker_kind", "tokenize_first"},
                "train": {"checkpoint_every", "keep_checkpoints", "max_restarts", "step_deadline_seconds"},
            },
        },
    )
    return digest_of({"recipe": "sft", "job": values, "model": model_digest, "data": data_digest})


def _data_digest(job: SftJob, data_dir: Path, own_digest: str) -> str:
    """Opens the sources of a mixture, so that one that is not there is found before any worker starts."""
    if not job.config.data.mixture:
        return own_digest
    return mixture_digest(open_mixture(job.config.data, data_dir, Conversation, kind="conversation"))


def _check_admitted(report: LogitReport, model_digest: str, *, packing: str) -> None:
    if report.model_digest != model_digest:
        raise ModelError(
            f"the logit report is of model {report.model_digest[:12] or 'unknown'}, the model to train is {model_digest[:12]}; "
            "verify this model and pass its own report"
        )
    if not report.passed:
        problems = "; ".join(report.problems[:5]) or "no reason given"
        raise ModelError(f"model {model_digest[:12]} has not passed its logit report ({problems}); it must not be trained")
    if packing == "pack" and report.packing_problem:
        raise ModelError(
            f"several documents in a row are not proven for model {model_digest[:12]} ({report.packing_problem}); set "
            "config.data.packing: pad"
        )


def _trained(job: SftJob, model_dir: Path) -> tuple[int, str | None]:
    """(numbers that are trained, why their adapters can't be written for PEFT); refuses what the model doesn't have."""
    lora = job.config.model.lora
    if is_fallback(model_dir):
        return num_fallback_parameters(model_dir, lora), None
    _, spec = read_spec(model_dir)
    return num_trained(spec, lora), why_not_peft(lora, spec) if lora else None


def _to_micro_batches(job: SftJob, pad_id: int) -> Callable[[StepRows], list[MicroBatch]]:
    size = job.config.train.rows_per_micro_batch

    def prepare(step_rows: StepRows) -> list[MicroBatch]:
        rows = step_rows.rows
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [MicroBatch.of(collate(group, job.sequence_length, pad_id)) for group in groups]

    return prepare


def _finish_save(store: CheckpointStore, deadline_seconds: float, journal: Journal | None) -> None:
    """Wait until the save under way has all its parts, and have it published."""
    if store.pending:
        store.wait_for_part()
        barrier(deadline_seconds)
        store.all_parts_written(before_publishing=journal.sync if journal else None)


def _fill(out: Staged, job: SftJob, run_dir: Path, result: Json) -> PackingReport:
    """Everything in `out` is a function of the job and its inputs: nothing of the clock, nothing of restarts."""
    final = checkpoint_folder(run_dir / CHECKPOINTS, job.steps)
    for entry in verify(final).files:
        link_or_copy(final / entry.path, out.path / "state" / entry.path)
        out.known_sha256[f"state/{entry.path}"] = entry.sha256
    weights = {}
    for path in sorted(path for path in (run_dir / EXPORT).rglob("*") if path.is_file()):
        name = path.relative_to(run_dir / EXPORT)
        link_or_copy(path, out.path / name)
        if path.suffix == ".safetensors":
            out.known_sha256[name.as_posix()] = file_sha256(path)
            if name.parts[0] == WEIGHTS:
                weights[name.name] = out.known_sha256[name.as_posix()]
    shutil.copyfile(run_dir / METRICS_NAME, out.path / METRICS_NAME)
    rows = read_rows(run_dir / METRICS_NAME)
    curves = {key: [row[key] for row in rows] for key in rows[0] if key != "sample_ids"}
    packing = packing_report(merge_states([values["data"] for values in read_values(final)]))
    train_report = {"curves": curves, "packing": packing.to_json(), "mask_preview_html": result["mask_preview_html"]}
    (out.path / "train_report.json").write_text(canonical_json({**train_report, "job": job.model_dump(mode="json")}))
    totals = ("num_tokens", "num_targets", "num_slots")
    out.counts.update(steps=job.steps, **{key: sum(row[key] for row in rows) for key in totals})
    out.meta.update(format="huggingface", step=job.steps, weights_digest=digest_of(weights), loss_last=rows[-1]["loss"])
    return packing

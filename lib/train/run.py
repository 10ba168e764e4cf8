"""A training run as its driver sees it: check the inputs, start the ranks, and make an artifact of what they leave."""

import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.cluster.group import Event, GroupFactory, Worker
from lib.config.recipes import TrainJob
from lib.config.rows import Kind
from lib.core.artifact import Staged, read_manifest, verify
from lib.core.errors import ModelError
from lib.core.manifest import Json, canonical_json, digest_of
from lib.data.examples import mixture_digest, open_mixture
from lib.data.schemas.arrow import TYPE_OF
from lib.data.stats import PackingReport, packing_report
from lib.data.stream import merge_states
from lib.models.hf_fallback import is_fallback
from lib.models.hf_io import read_spec
from lib.models.logit_report import LogitReport
from lib.parallel.plan import check_plan
from lib.train.checkpoint import KIND, read_values, step_name
from lib.train.folder_shelf import StoredFolder
from lib.train.handover import take_over
from lib.train.lock import run_lock
from lib.train.meters import LOG_NAMES, METRICS_NAME, TIMINGS_NAME, read_rows, speed_summary
from lib.train.model_folder import WEIGHTS
from lib.train.resume import STATE, begin_from, steps_before
from lib.train.run_home import open_shelf
from lib.train.shelf import Shelf
from lib.train.supervise import CHECKPOINTS, Progress, Start, resume_step, tell, train_with_restarts
from lib.train.tracker import track

_NOT_DECISIVE: Any = {
    "nodes": True,
    "gpus_per_node": True,
    "config": {
        "cluster": True,
        "parallel": True,
        "tracking": True,
        "data": {"prefetch_batches", "workers", "worker_kind", "tokenize_first"},
        "train": {
            "checkpoint_every",
            "export_dtype",
            "grace_seconds",
            "keep_best",
            "keep_checkpoints",
            "keep_every",
            "max_restarts",
            "step_deadline_seconds",
            "profile",
        },
    },
}
"""Parts of a job that may change on a restart."""


@dataclass(frozen=True)
class Origins:
    """Addresses where a node can fetch what it is given."""

    model: str
    data: str


@dataclass(frozen=True)
class RunInputs:
    """What a run is given, and where it is."""

    model_dir: Path
    """Artifact: a Hugging Face model."""
    data_dir: Path
    """Artifact: a data set, tokenised or not."""
    report: LogitReport
    """Of the model."""
    run_dir: Path
    """The run's own folder."""
    resume_from: Path | None = None
    """Artifact: the checkpoint of an earlier run, from whose state this one goes on; None: it begins with the model."""
    home: str | None = None
    """Address of an object store, as fsspec knows it, that keeps the run's checkpoints; None: the run folder keeps them, which
    all nodes share then."""
    origins: Origins | None = None
    """For nodes that lack model_dir or data_dir, which are at their places in the artifact store; None: all nodes have them."""


def run_training(
    recipe: str,
    worker: type[Worker],
    job: TrainJob,
    inputs: RunInputs,
    out: Staged,
    *,
    kind: Kind,
    group_factory: GroupFactory,
    progress: Progress,
) -> None:
    """Train and fill `out`, an artifact of kind "checkpoint": state/, metrics.jsonl, train_report.json, and what rank 0 handed
    over (see lib/train/handover.py).

    A run that was killed, driver and all, goes on from its last checkpoint when it is called again with the same job and
    the same run folder or home, and ends in the same bits.

    Args:
        recipe: its name; seeds and identity depend on it.
        worker: its ranks. `train` takes the job as plain values and a place: "recipe", "model_dir", "data_dir", "run_dir",
            "home", "identity"; "resume_step" (0: from the model) and "start", of the `Start`; "model" and "resume_from", the
            digests of the model and of the checkpoint that the run begins with, which has "steps_before" behind it; "origins"
            of folders that a node may lack. What it gives stands in train_report.json: "mask_preview_html", and what else the
            recipe's page shows.
        out: its lineage, with what the caller has put there, becomes tags of the tracked run.
        kind: of the examples.
        progress: called with the number of steps done and figures to show beside it (see lib/train/supervise.py `tell`).
    Raises:
        ConfigError: the model can't be cut as config.parallel says; resume_from is past the last step or of other data.
        ModelError: the logit report is of another model, was not passed, or doesn't prove the packing that is asked for;
            resume_from is of another model or trains other weights.
        RunInUseError: another live process trains in the run folder.
        NonFiniteLossError: names the step and its samples; earlier checkpoints are untouched.
        InfraError: the workers died too often, or a checkpoint couldn't be written.
    """
    model, data, run_dir = verify(inputs.model_dir), read_manifest(inputs.data_dir), inputs.run_dir
    spec = None if is_fallback(inputs.model_dir) else read_spec(inputs.model_dir)[1]
    check_plan(job.config.parallel, job.shape.num_ranks, spec=spec, model=job.config.model)
    _check_admitted(inputs.report, model.digest, job)
    data_digest = _data_digest(job, inputs.data_dir, data.digest, kind)
    place = _place(recipe, job, inputs, model_digest=model.digest, data_digest=data_digest)
    shelf, identity, values = open_shelf(place["home"]), place["identity"], job.model_dump(mode="json")
    out.lineage.update(model=model.digest, data=data_digest, job=digest_of(values))
    out.lineage.update({"resume_from": place["resume_from"]} if place["resume_from"] else {})

    def begin() -> Start:
        token = secrets.token_hex(8)
        shelf.claim(token)
        step = resume_step(shelf, identity)
        if inputs.resume_from and not step:
            step = begin_from(inputs.resume_from, shelf, identity, token)
        return Start(step, token)

    with run_lock(run_dir), track(job.config.tracking, identity, values, out.lineage) as tracked:

        def on_event(event: Event) -> None:
            tracked.log(event)
            tell(progress, event)

        result = train_with_restarts(
            worker,
            lambda start: [values, {**place, "resume_step": start.step, "start": start.token}],
            shape=job.shape,
            cluster=job.config.cluster,
            train=job.config.train,
            begin=begin,
            group_factory=group_factory,
            on_event=on_event,
        )
        packing, timings = _fill(out, job, shelf, result)
    speed = speed_summary(timings)
    spent = speed["part_seconds"]
    waste = packing.waste(train_seconds=speed["train_seconds"], stall_seconds=spent["data"], straggler_seconds=spent["wait"])
    out.info.update(
        speed,
        waste=asdict(waste),
        restarts=result["restarts"],
        num_ranks=job.shape.num_ranks,
        mlflow_run_id=tracked.run_id,
        run_identity=identity,
    )


def _place(recipe: str, job: TrainJob, inputs: RunInputs, *, model_digest: str, data_digest: str) -> Json:
    """What the ranks are told beside the job; refuses a checkpoint to go on from that doesn't fit."""
    begun = inputs.resume_from
    before = steps_before(begun, steps=job.steps, model_digest=model_digest)
    from_digest = read_manifest(begun).digest if begun else None
    identity = run_identity(recipe, job, model_digest=model_digest, data_digest=data_digest, from_digest=from_digest)
    folders = {"model_dir": str(inputs.model_dir), "data_dir": str(inputs.data_dir), "run_dir": str(inputs.run_dir)}
    folders["home"] = inputs.home or str(inputs.run_dir / CHECKPOINTS)
    given = inputs.origins
    origins = {str(inputs.model_dir): given.model, str(inputs.data_dir): given.data} if given else {}
    names = {"recipe": recipe, "identity": identity, "model": model_digest, "resume_from": from_digest}
    return {**folders, **names, "origins": origins, "steps_before": before}


def run_identity(recipe: str, job: TrainJob, *, model_digest: str, data_digest: str, from_digest: str | None = None) -> str:
    """Names a run by what decides its numbers: not by the cluster, deadlines or tracking, which may change on a restart.

    from_digest: of the checkpoint that it goes on from.
    """
    values = job.model_dump(mode="json", exclude=_NOT_DECISIVE)
    return digest_of({"recipe": recipe, "job": values, "model": model_digest, "data": data_digest, "from": from_digest})


def _data_digest(job: TrainJob, data_dir: Path, own_digest: str, kind: Kind) -> str:
    """Opens the sources of a mixture, so that one that is not there is found before any worker starts."""
    if not job.config.data.mixture:
        return own_digest
    return mixture_digest(open_mixture(job.config.data, data_dir, TYPE_OF[kind], kind=kind))


def _check_admitted(report: LogitReport, model_digest: str, job: TrainJob) -> None:
    if report.model_digest != model_digest:
        raise ModelError(
            f"the logit report is of model {report.model_digest[:12] or 'unknown'}, the model to train is {model_digest[:12]}; "
            "verify this model and pass its own report"
        )
    if not report.passed:
        problems = "; ".join(report.problems[:5]) or "no reason given"
        raise ModelError(f"model {model_digest[:12]} has not passed its logit report ({problems}); it must not be trained")
    if job.config.model.lora and report.adapter_problem:
        raise ModelError(
            f"adapters are not proven for model {model_digest[:12]} ({report.adapter_problem}); leave config.model.lora out"
        )
    if job.config.data.packing == "pack" and report.packing_problem:
        raise ModelError(
            f"several documents in a row are not proven for model {model_digest[:12]} ({report.packing_problem}); set "
            "config.data.packing: pad"
        )


def _fill(out: Staged, job: TrainJob, shelf: Shelf, result: Json) -> tuple[PackingReport, list[Json]]:
    """Everything in `out` is a function of the job and its inputs: nothing of the clock, nothing of restarts. Returns what
    the clock said beside it: the rows of timings.jsonl."""
    state = out.path / STATE
    for entry in shelf.take(step_name(job.steps), KIND, state).files:
        out.known_sha256[entry.path if entry.path == METRICS_NAME else f"{STATE}/{entry.path}"] = entry.sha256
    rows, timings = (read_rows(state / name) for name in LOG_NAMES)
    os.replace(state / METRICS_NAME, out.path / METRICS_NAME)
    (state / TIMINGS_NAME).unlink()
    weights = {}
    for entry in take_over(shelf, out.path).files:
        out.known_sha256[entry.path] = entry.sha256
        if entry.path.startswith(f"{WEIGHTS}/") and entry.path.endswith(".safetensors"):
            weights[entry.path.removeprefix(f"{WEIGHTS}/")] = entry.sha256
    curves = {key: [row[key] for row in rows] for key in rows[0] if key != "samples"}
    packing = packing_report(merge_states([values["data"] for values in read_values(StoredFolder(state))]))
    shown = {key: value for key, value in result.items() if key != "restarts"}
    train_report = {"curves": curves, "packing": packing.to_json(), **shown}
    (out.path / "train_report.json").write_text(canonical_json({**train_report, "job": job.model_dump(mode="json")}))
    totals = ("num_tokens", "num_targets", "num_slots")
    out.counts.update(steps=job.steps, **{key: sum(row[key] for row in rows) for key in totals})
    out.meta.update(format="huggingface", step=job.steps, weights_digest=digest_of(weights), loss_last=rows[-1]["loss"])
    return packing, timings

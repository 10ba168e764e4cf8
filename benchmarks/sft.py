"""A whole fine-tuning job at equal steps and samples: two ranks of ours against a plain transformers loop.

Ours is `run_sft` (packing, two FSDP2 ranks of one thread, metrics, a checkpoint); the loop is what most people write: one
process of two threads, samples padded to the longest, labels -100 off the answers, one backward a step. It is raced as
it is and with its logits restricted to trained positions. Every step of each has the same samples, so the losses agree;
a job's seconds are those of its steps but the first. Order: ours, loop, loop, ours. Float32, the real SmolLM2.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.floor import measure_floor
from benchmarks.report import Report, say
from lib.cluster.local import LocalGroup
from lib.config.recipes import SftJob
from lib.core.artifact import read_manifest, stage_artifact
from lib.core.errors import UserError
from lib.core.examples import IGNORE_INDEX, Conversation
from lib.data.rows import ingest_dataset
from lib.data.table import ExampleTable
from lib.models.admit import admit_model
from lib.models.logit_report import read_logit_report, write_logit_report
from lib.models.verify import build_logit_report
from lib.recipes.sft import run_sft
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer
from lib.train.compact_ids import expand_ids
from lib.train.meters import METRICS_NAME, TIMINGS_NAME, read_rows
from lib.train.optim import learning_rate_at
from lib.train.run import RunInputs

ASSETS = Path(".quickstart")
THREADS = 2


def make_job(steps: int) -> SftJob:
    """The quickstart's job, shorter, at 16 samples a step: four rows of four."""
    return SftJob.parse(
        {
            "learning_rate": 1e-4,
            "steps": steps,
            "sequence_length": 272,
            "nodes": 1,
            "gpus_per_node": 0,
            "config": {
                "data": {"num_streams": 8},
                "model": {"compute_dtype": "float32"},
                "optim": {"warmup_steps": 2, "beta2": 0.95, "weight_decay": 0.0},
                "train": {"rows_per_step": 4, "rows_per_micro_batch": 2},
                "cluster": {"cpu_ranks_per_node": THREADS, "threads_per_rank": 1},
                "tracking": {"mlflow": False},
            },
        },
        where="job",
    )


def prepare(root: Path) -> None:
    """The artifacts a job needs, made by the product's own gates."""
    if not (ASSETS / "smollm2").is_dir():
        raise UserError(f"{ASSETS}/smollm2 is not there; run `make assets`")
    with stage_artifact(root / "model", "model") as staged:
        admit_model(ASSETS / "smollm2", staged)
    with stage_artifact(root / "data", "dataset") as staged:
        ingest_dataset(ASSETS / "chain_sum" / "train.jsonl", staged)
    with stage_artifact(root / "report", "logit_report") as staged:
        write_logit_report(build_logit_report(root / "model", num_configs=2), read_manifest(root / "model").digest, staged)


def run_ours(root: Path, name: str, job: SftJob) -> dict[str, Any]:
    """{"losses", "sample_ids", "seconds"} by step."""
    run_dir = root / name
    with stage_artifact(root / f"{name}-checkpoint", "checkpoint") as out:
        inputs = RunInputs(root / "model", root / "data", read_logit_report(root / "report"), run_dir)
        run_sft(job, inputs, out, group_factory=LocalGroup, progress=lambda count, **figures: None)
    metrics, timings = read_rows(run_dir / METRICS_NAME), read_rows(run_dir / TIMINGS_NAME)
    return {
        "losses": [row["loss"] for row in metrics],
        "sample_ids": [expand_ids(row["samples"]) for row in metrics],
        "seconds": [row["seconds"] for row in timings],
    }


def run_loop(root: str, sample_ids: list[list[str]], job_values: dict[str, Any], restrict: bool, results: Connection) -> None:
    """The plain loop, in a process of its own; sends what `run_ours` returns."""
    torch.set_num_threads(THREADS)
    job = SftJob.parse(job_values, where="job")
    model = AutoModelForCausalLM.from_pretrained(Path(root, "model"), dtype=torch.float32)
    model.train()
    optim = job.config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=job.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        weight_decay=0.0,
        fused=True,
    )
    table = ExampleTable.open(Path(root, "data"), Conversation)
    rows = {conversation.sample_id: conversation for conversation in (table[index] for index in range(len(table)))}
    encoder = ChatEncoder(Tokenizer.load(Path(root, "model")))
    losses, seconds = [], []
    began = time.perf_counter()
    for step, ids in enumerate(sample_ids, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps=job.steps, peak=job.learning_rate, config=optim)
        token_ids, labels, attention_mask = _padded(encoder, [rows[sample_id] for sample_id in ids])
        loss = _loop_loss(model, token_ids, labels, attention_mask, restrict)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        now = time.perf_counter()
        seconds.append(now - began)
        began = now
    results.send({"losses": losses, "seconds": seconds})


def _padded(encoder: ChatEncoder, conversations: list[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """token_ids, labels (unshifted, as transformers takes them) and attention mask, each [rows, longest]."""
    encoded = encoder.encode(conversations)
    shape = (len(encoded), max(len(one.token_ids) for one in encoded))
    token_ids, labels = torch.full(shape, encoder.tokenizer.pad_id), torch.full(shape, IGNORE_INDEX)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for index, one in enumerate(encoded):
        ids, mask = torch.tensor(one.token_ids), torch.tensor(one.loss_mask)
        token_ids[index, : len(ids)], attention_mask[index, : len(ids)] = ids, 1
        labels[index, : len(ids)] = torch.where(mask, ids, IGNORE_INDEX)
    return token_ids, labels, attention_mask


def _loop_loss(
    model: Any, token_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor, restrict: bool
) -> torch.Tensor:
    if not restrict:
        loss: torch.Tensor = model(input_ids=token_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss
        return loss
    hidden = model.model(input_ids=token_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    kept = labels[:, 1:] != IGNORE_INDEX
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][kept]), labels[:, 1:][kept])


def loop_in_fresh_process(root: Path, sample_ids: list[list[str]], job: SftJob, *, restrict: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (str(root), sample_ids, job.model_dump(mode="json"), restrict, sender)
    process = context.Process(target=run_loop, args=arguments)
    process.start()
    sender.close()
    try:
        measured: dict[str, Any] = receiver.recv()
    finally:
        process.kill()
        process.join()
    return measured


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sft")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each job")
    job = make_job(parser.parse_args(arguments).steps)
    report = Report("sft")
    floor = measure_floor()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        say("  preparing model, data and logit report")
        prepare(root)
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "loop": [], "loop_trained_logits": []}
        for name in ("ours", "loop", "loop_trained_logits", "loop_trained_logits", "loop", "ours"):
            if name == "ours":
                measured = run_ours(root, f"run-{len(runs[name])}", job)
            else:
                ids = runs["ours"][0]["sample_ids"]
                measured = loop_in_fresh_process(root, ids, job, restrict=name == "loop_trained_logits")
            runs[name].append(measured)
            say(f"  {name}: {statistics.median(measured['seconds'][1:]):.2f} s a step, last loss {measured['losses'][-1]:.5f}")
    figures = {
        name: {"step_seconds": statistics.median(second for run in found for second in run["seconds"][1:])}
        for name, found in runs.items()
    }
    report.ours = figures.pop("ours")
    report.peers = figures
    for peer in figures:
        report.compare("step_seconds", peer, smaller_is_better=True, target=1.0)
    report.details = {
        "steps": job.steps,
        "samples": [len(ids) for ids in runs["ours"][0]["sample_ids"]],
        "losses": {name: found[0]["losses"] for name, found in runs.items()},
        "max_loss_difference": max(
            abs(ours - theirs)
            for peer in figures
            for ours, theirs in zip(runs["ours"][0]["losses"], runs[peer][0]["losses"], strict=True)
        ),
    }
    report.print(floor)
